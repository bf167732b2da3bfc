// The kernels for a GPU. What each does, to the bit, is written in ../reference.py; which is started when, in launches.py.
//
// * No header is included: NVRTC needs none, and the tests compile this file with g++ too, behind a few definitions.
// * No fused multiply-add (launches.OPTIONS): NumPy rounds a product before it is added, so do these.
// * No thread waits for another: all a kernel needs is there when it starts. What depends on a sum is the next kernel.
// * Every kernel takes one struct, Work, by value; its layout is launches.WORK, and is compared when this is compiled.
// * A loop goes in packs of 16 bytes where the addresses allow it, and by single elements else and at the end.

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

struct Work {
    int64 size;         // how many elements, or rows
    int64 columns;      // of a row: elements, or units that are copied
    int64 pushes;       // the first addresses are those
    int64 outs;         // and these the next
    int64 packed;       // 1: every address is a multiple of its pack's bytes
    int64 rows;         // how many there are, if `size` is another number
    void* value;
    void* target;
    void* states[3];    // null: there is none
    double* scratch;
    int64* ids;
    int64* order;
    double scale, clip, decay;
    double numbers[8];  // of the optimizer, as its plain form takes them
    void** far;         // the addresses, if they are more than NEAR
    void* near[NEAR];
};
static_assert(sizeof(Work) == WORK_BYTES, "launches.WORK has another layout");

#ifdef __CUDACC__
#define INLINE __device__ __forceinline__
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ Work work)

// The processor's own conversions; said in PTX because that needs no header.
INLINE float from_half(uint16 bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}
INLINE uint16 to_half(float number) {
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}
INLINE float from_bits(uint32 bits) { return __uint_as_float(bits); }
INLINE uint32 to_bits(float number) { return __float_as_uint(number); }
#endif

INLINE int64 thread() { return (int64)blockIdx.x * blockDim.x + threadIdx.x; }
INLINE int64 threads() { return (int64)gridDim.x * blockDim.x; }
INLINE void* address(const Work& work, int64 k) { return work.far ? work.far[k] : work.near[k]; }

// --- types ---------------------------------------------------------------------------------------

struct half { uint16 bits; };
struct brain { uint16 bits; };
struct flag { uint8 bits; };
struct chunk { uint64 low, high; };

// What an element is added up in, and back from there, rounded.
template <class T> struct Sum { typedef T type; };
template <> struct Sum<half> { typedef float type; };
template <> struct Sum<brain> { typedef float type; };

template <class T> INLINE T widen(T x) { return x; }
INLINE float widen(half x) { return from_half(x.bits); }
INLINE float widen(brain x) { return from_bits((uint32)x.bits << 16); }

template <class T> struct Narrow {
    static INLINE T from(T x) { return x; }
};
template <> struct Narrow<half> {
    static INLINE half from(float x) { return half{to_half(x)}; }
};
template <> struct Narrow<brain> {  // to nearest even; what is no number stays none
    static INLINE brain from(float x) {
        uint32 bits = to_bits(x);
        return brain{(uint16)((x == x ? bits + (bits >> 16 & 1) + 0x7FFF : bits | 0x400000) >> 16)};
    }
};

template <class T> INLINE T plus(T a, T b) { return (T)(a + b); }
INLINE flag plus(flag a, flag b) { return flag{(uint8)(a.bits || b.bits)}; }

INLINE float root(float x) { return sqrtf(x); }
INLINE double root(double x) { return sqrt(x); }
INLINE float magnitude(float x) { return fabsf(x); }
INLINE double magnitude(double x) { return fabs(x); }

// --- loops ---------------------------------------------------------------------------------------

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <class T, int N> INLINE Pack<T, N> load(const void* from, int64 i) {
    return *(const Pack<T, N>*)((const T*)from + i);
}
template <class T, int N> INLINE void store(void* to, int64 i, const Pack<T, N>& pack) {
    *(Pack<T, N>*)((T*)to + i) = pack;
}

// `Step::run<N>(work, i)` for the elements from i on, N at a time.
template <class Step, int N> INLINE void each(const Work& work) {
    int64 packs = work.packed ? work.size / N : 0;
    for (int64 i = thread(); i < packs; i += threads()) Step::template run<N>(work, i * N);
    for (int64 i = packs * N + thread(); i < work.size; i += threads()) Step::template run<1>(work, i);
}

// The sum of the pushes, left to right, not rounded yet; `first`: where their addresses begin. Some are loaded before
// they are added, so that each thread has several loads on their way.
template <class P, int N>
INLINE void add_up(const Work& work, int64 i, typename Sum<P>::type (&total)[N], int64 first = 0) {
    const int AHEAD = 3;
    Pack<P, N> begin = load<P, N>(address(work, first), i), next[AHEAD];
#pragma unroll
    for (int j = 0; j < N; j++) total[j] = widen(begin.at[j]);
    for (int64 k = 1; k < work.pushes; k += AHEAD) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (k + a < work.pushes) next[a] = load<P, N>(address(work, first + k + a), i);
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (k + a < work.pushes) {
#pragma unroll
                for (int j = 0; j < N; j++) total[j] = plus(total[j], widen(next[a].at[j]));
            }
    }
}

// --- sums ----------------------------------------------------------------------------------------

template <class T> struct Merge {
    template <int N> static INLINE void run(const Work& work, int64 i, int64 first = 0) {
        Pack<T, N> merged;
        if (work.pushes == 1) {  // copied, whatever the bits mean
            merged = load<T, N>(address(work, first), i);
        } else {
            typename Sum<T>::type total[N];
            add_up<T, N>(work, i, total, first);
#pragma unroll
            for (int j = 0; j < N; j++) merged.at[j] = Narrow<T>::from(total[j]);
        }
        for (int64 k = 0; k < work.outs; k++) store(address(work, first + work.pushes + k), i, merged);
    }
};

// Many sums, each of one tile: the addresses of its pushes and of the sum, and how many elements. A block does a tile.
template <class T> INLINE void merge_many(const Work& work) {
    const int N = 16 / sizeof(T);
    int64 words = work.pushes + 2;
    for (int64 first = blockIdx.x * words; first < work.size * words; first += gridDim.x * words) {
        int64 size = (int64)address(work, first + words - 1), packs = size / N;
        for (int64 k = 0; k < words - 1; k++)
            if ((uint64)address(work, first + k) % 16) packs = 0;
        for (int64 i = threadIdx.x; i < packs; i += blockDim.x) Merge<T>::template run<N>(work, i * N, first);
        for (int64 i = packs * N + threadIdx.x; i < size; i += blockDim.x) Merge<T>::template run<1>(work, i, first);
    }
}

// The sum, rounded to the pushes' type, then in the value's; scaled, clipped, and with the weights' decay.
template <class T, class P, int N> INLINE void gradient(const Work& work, int64 i, const T (&w)[N], T (&g)[N]) {
    typename Sum<P>::type total[N];
    add_up<P, N>(work, i, total);
    T scale = (T)work.scale, high = (T)work.clip, low = -high, decay = (T)work.decay;
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] = (T)widen(Narrow<P>::from(total[j]));
        if (work.scale != 1) g[j] = g[j] * scale;
        g[j] = g[j] > high ? high : g[j] < low ? low : g[j];
        if (work.decay != 0) g[j] = g[j] + decay * w[j];
    }
}

// Sums of squares: the elements i, i + LANES, i + 2 LANES ... in this order by one thread, as in the reference.
template <class Square, int SUMS> INLINE void lanes(const Work& work) {
    for (int64 lane = thread(); lane < LANES; lane += threads()) {
        double sums[SUMS] = {};
#pragma unroll 8
        for (int64 i = lane; i < work.size; i += LANES) {
            double x[SUMS];
            Square::take(work, i, x);
#pragma unroll
            for (int s = 0; s < SUMS; s++) sums[s] += x[s] * x[s];
        }
        for (int s = 0; s < SUMS; s++) work.scratch[s * LANES + lane] = sums[s];
    }
}
INLINE double length(const double* sums) {
    double total = 0;
#pragma unroll 16
    for (int64 i = 0; i < LANES; i++) total += sums[i];
    return sqrt(total);
}

template <class P> struct Merged {
    static INLINE void take(const Work& work, int64 i, double (&x)[1]) {
        typename Sum<P>::type total[1];
        add_up<P, 1>(work, i, total);
        x[0] = (double)widen(Narrow<P>::from(total[0]));
    }
};
KERNEL(norm_end) {
    if (thread() == 0) *(double*)work.target = length(work.scratch);
}

// --- optimizers ----------------------------------------------------------------------------------

// An optimizer is a rule for one element: it changes w, which was the value, by g and its states.
template <class T, class P, class Rule, int STATES> struct Update {
    template <int N> static INLINE void run(const Work& work, int64 i) {
        Pack<T, N> w = load<T, N>(work.value, i), s[STATES + 1];
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (work.states[k]) s[k] = load<T, N>(work.states[k], i);
        T g[N];
        gradient<T, P, N>(work, i, w.at, g);
#pragma unroll
        for (int j = 0; j < N; j++) {
            T own[STATES + 1];
#pragma unroll
            for (int k = 0; k < STATES; k++) own[k] = work.states[k] ? s[k].at[j] : (T)0;
            Rule::apply(work, w.at[j], g[j], own);
#pragma unroll
            for (int k = 0; k < STATES; k++) s[k].at[j] = own[k];
        }
        store(work.target, i, w);
#pragma unroll
        for (int k = 0; k < STATES; k++)
            if (work.states[k]) store(work.states[k], i, s[k]);
    }
};

#define NUMBER(k) ((T)work.numbers[k])
#define LEFT(k) ((T)(1 - work.numbers[k]))

struct Accumulate {
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* s) { w = w + g; }
};

struct Sgd {  // lr, (decay), momentum, gain, nesterov, begin
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* m) {
        if (work.states[0]) {
            *m = work.numbers[5] != 0 ? g : *m * NUMBER(2) + NUMBER(3) * g;
            g = work.numbers[4] != 0 ? g + NUMBER(2) * *m : *m;
        }
        w = w - NUMBER(0) * g;
    }
};

struct Adam {  // rate, root, first, second, eps, (decay), shrink; states: mean, square, square_max
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* s) {
        s[0] = s[0] * NUMBER(2) + LEFT(2) * g;
        s[1] = s[1] * NUMBER(3) + g * g * LEFT(3);
        T square = s[1];
        if (work.states[2]) square = s[2] = square > s[2] || square != square ? square : s[2];
        w = w * NUMBER(6) - s[0] / (root(square) / NUMBER(1) + NUMBER(4)) * NUMBER(0);
    }
};

struct Adagrad {  // rate, eps, (decay)
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* s) {
        s[0] = s[0] + g * g;
        w = w - NUMBER(0) * g / (root(s[0]) + NUMBER(1));
    }
};

struct Rmsprop {  // lr, alpha, eps, (decay), momentum; states: square, momentum, mean
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* s) {
        s[0] = s[0] * NUMBER(1) + LEFT(1) * g * g;
        T square = s[0];
        if (work.states[2]) {
            s[2] = s[2] + LEFT(1) * (g - s[2]);
            square = square - s[2] * s[2];
        }
        g = g / (root(square) + NUMBER(2));
        if (work.states[1]) g = s[1] = s[1] * NUMBER(4) + g;
        w = w - NUMBER(0) * g;
    }
};

struct Adadelta {  // lr, rho, eps, (decay); states: square, delta
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* s) {
        s[0] = s[0] * NUMBER(1) + LEFT(1) * g * g;
        g = g * (root(s[1] + NUMBER(2)) / root(s[0] + NUMBER(2)));
        s[1] = s[1] * NUMBER(1) + LEFT(1) * g * g;
        w = w - NUMBER(0) * g;
    }
};

struct Ftrl {  // lr, beta, l1, l2; states: z, n
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* s) {
        T before = root(s[1]);
        s[1] = s[1] + g * g;
        T after = root(s[1]);
        s[0] = s[0] + (g - (after - before) / NUMBER(0) * w);
        T over = magnitude(s[0]) - NUMBER(2), sign = (T)(s[0] > 0 ? 1 : -1);
        if (!(s[0] > 0 || s[0] < 0)) sign = s[0] == 0 ? (T)0 : s[0];
        w = -(sign * (over < 0 ? (T)0 : over)) / ((NUMBER(1) + after) / NUMBER(0) + NUMBER(3));
    }
};

// Those whose rate depends on norms: sums of squares, then the rate from them, then the change by it.

template <class T, class P> struct LarsSquares {
    static INLINE void take(const Work& work, int64 i, double (&x)[2]) {
        T w[1] = {((const T*)work.value)[i]}, g[1];
        gradient<T, P, 1>(work, i, w, g);
        x[0] = w[0], x[1] = g[0];
    }
};
KERNEL(lars_rate) {  // lr, trust, eps, decay, momentum
    if (thread() != 0) return;
    double weights = length(work.scratch), slopes = length(work.scratch + LANES), rate = work.numbers[0];
    if (weights > 0 && slopes > 0)
        rate = rate * (work.numbers[1] * weights / (slopes + work.numbers[3] * weights + work.numbers[2]));
    *(double*)work.target = rate;
}
struct Lars {
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* m) {
        *m = *m * NUMBER(4) + (T)*work.scratch * g;
        w = w - *m;
    }
};

struct LambMoments {  // lr, unbias, root, first, second, eps, decay; states: mean, square
    template <class T> static INLINE void apply(const Work& work, T& w, T g, T* s) {
        s[0] = s[0] * NUMBER(3) + LEFT(3) * g;
        s[1] = s[1] * NUMBER(4) + LEFT(4) * g * g;
    }
};
template <class T> INLINE T lamb_step(const Work& work, T w, T mean, T square) {
    return mean / NUMBER(1) / (root(square) / NUMBER(2) + NUMBER(5)) + NUMBER(6) * w;
}
template <class T> struct LambSquares {
    static INLINE void take(const Work& work, int64 i, double (&x)[2]) {
        T w = ((const T*)work.target)[i];
        x[0] = w, x[1] = lamb_step(work, w, ((const T*)work.states[0])[i], ((const T*)work.states[1])[i]);
    }
};
KERNEL(lamb_rate) {
    if (thread() != 0) return;
    double weights = length(work.scratch), steps = length(work.scratch + LANES), rate = work.numbers[0];
    *(double*)work.target = weights > 0 && steps > 0 ? rate * (weights / steps) : rate;
}
template <class T> struct Lamb {
    template <int N> static INLINE void run(const Work& work, int64 i) {
        Pack<T, N> w = load<T, N>(work.target, i), mean = load<T, N>(work.states[0], i);
        Pack<T, N> square = load<T, N>(work.states[1], i);
#pragma unroll
        for (int j = 0; j < N; j++)
            w.at[j] = w.at[j] - (T)*work.scratch * lamb_step(work, w.at[j], mean.at[j], square.at[j]);
        store(work.target, i, w);
    }
};

// --- other ---------------------------------------------------------------------------------------

template <class From, class To> struct Cast {
    template <int N> static INLINE void run(const Work& work, int64 i) {
        Pack<From, N> from = load<From, N>(address(work, 0), i);
        Pack<To, N> to;
#pragma unroll
        for (int j = 0; j < N; j++) to.at[j] = Narrow<To>::from(widen(from.at[j]));
        store(address(work, 1), i, to);
    }
};

// Is an id no row? Then scratch[0] becomes 1; all that write write the same.
KERNEL(find_wrong) {
    for (int64 i = thread(); i < work.size; i += threads())
        if (work.ids[i] < 0 || work.ids[i] >= work.rows) *work.scratch = 1;
}

template <class Unit> INLINE void gather(const Work& work) {
    const Unit* source = (const Unit*)work.value;
    Unit* out = (Unit*)work.target;
    for (int64 e = thread(); e < work.size * work.columns; e += threads())
        out[e] = source[work.ids[e / work.columns] * work.columns + e % work.columns];
}

// `order` sorts the ids and keeps equal ones in order. Does this row's id come first there, among equal ones?
INLINE bool is_first(const Work& work, int64 at) {
    return at == 0 || work.ids[work.order[at - 1]] != work.ids[work.order[at]];
}

// `total`, and to it, one after the other, the rows of an id from the one at `at` on.
template <class T> INLINE T add_rows(const Work& work, int64 at, int64 column, int64 id, T total) {
    for (; at < work.rows && work.ids[work.order[at]] == id; at++) {
        T next = ((const T*)work.value)[work.order[at] * work.columns + column];
        total = Narrow<T>::from(plus(widen(total), widen(next)));
    }
    return total;
}

// Whoever comes first adds all of that id.
template <class T> INLINE void scatter_add(const Work& work) {
    for (int64 e = thread(); e < work.rows * work.columns; e += threads()) {
        int64 at = e / work.columns, column = e % work.columns, id = work.ids[work.order[at]];
        if (!is_first(work, at)) continue;
        T* to = (T*)work.target + id * work.columns + column;
        *to = add_rows<T>(work, at, column, id, *to);
    }
}

// Target: is it the first of its id? A byte for each in the order that sorts them.
KERNEL(find_first) {
    for (int64 at = thread(); at < work.rows; at += threads()) ((uint8*)work.target)[at] = is_first(work, at);
}

// States: where the first of each id is, and room for the ids. `size`: how many different ones there are.
template <class T> INLINE void deduplicate(const Work& work) {
    const int64* first = (const int64*)work.states[0];
    for (int64 e = thread(); e < work.size * work.columns; e += threads()) {
        int64 at = first[e / work.columns], column = e % work.columns;
        T total = ((const T*)work.value)[work.order[at] * work.columns + column];
        ((T*)work.target)[e] = add_rows<T>(work, at + 1, column, work.ids[work.order[at]], total);
    }
    for (int64 k = thread(); k < work.size; k += threads())
        ((int64*)work.states[1])[k] = work.ids[work.order[first[k]]];
}

// What a start costs.
KERNEL(nothing) {}

// --- one kernel for each type --------------------------------------------------------------------

#define SUMS_OF(name, T)                                                        \
    KERNEL(merge_##name) { each<Merge<T>, 16 / sizeof(T)>(work); }              \
    KERNEL(merge_many_##name) { merge_many<T>(work); }                          \
    KERNEL(scatter_add_##name) { scatter_add<T>(work); }                        \
    KERNEL(deduplicate_##name) { deduplicate<T>(work); }
SUMS_OF(flag, flag)
SUMS_OF(u1, uint8)
SUMS_OF(u2, uint16)
SUMS_OF(u4, uint32)
SUMS_OF(u8, uint64)
SUMS_OF(half, half)
SUMS_OF(brain, brain)
SUMS_OF(f4, float)
SUMS_OF(f8, double)

#define NORM_OF(name, T) KERNEL(norm_##name) { lanes<Merged<T>, 1>(work); }
NORM_OF(half, half)
NORM_OF(brain, brain)
NORM_OF(f4, float)
NORM_OF(f8, double)

#define UPDATE(kernel, Rule, STATES, name, T, P) \
    KERNEL(kernel##_##name) { each<Update<T, P, Rule, STATES>, 16 / sizeof(T)>(work); }
#define OPTIMIZERS_OF(name, T, P)                                               \
    UPDATE(accumulate, Accumulate, 0, name, T, P)                               \
    UPDATE(sgd, Sgd, 1, name, T, P)                                             \
    UPDATE(adam, Adam, 3, name, T, P)                                           \
    UPDATE(adagrad, Adagrad, 1, name, T, P)                                     \
    UPDATE(rmsprop, Rmsprop, 3, name, T, P)                                     \
    UPDATE(adadelta, Adadelta, 2, name, T, P)                                   \
    UPDATE(ftrl, Ftrl, 2, name, T, P)                                           \
    UPDATE(lars, Lars, 1, name, T, P)                                           \
    UPDATE(lamb_moments, LambMoments, 2, name, T, P)                            \
    KERNEL(lars_squares_##name) { lanes<LarsSquares<T, P>, 2>(work); }
OPTIMIZERS_OF(f4_f4, float, float)
OPTIMIZERS_OF(f4_half, float, half)
OPTIMIZERS_OF(f4_brain, float, brain)
OPTIMIZERS_OF(f8_f8, double, double)

#define LAMB_OF(name, T)                                                        \
    KERNEL(lamb_squares_##name) { lanes<LambSquares<T>, 2>(work); }             \
    KERNEL(lamb_##name) { each<Lamb<T>, 16 / sizeof(T)>(work); }
LAMB_OF(f4, float)
LAMB_OF(f8, double)

KERNEL(cast_half_f4) { each<Cast<half, float>, 4>(work); }
KERNEL(cast_brain_f4) { each<Cast<brain, float>, 4>(work); }
KERNEL(cast_f4_half) { each<Cast<float, half>, 4>(work); }
KERNEL(cast_f4_brain) { each<Cast<float, brain>, 4>(work); }

KERNEL(gather_1) { gather<uint8>(work); }
KERNEL(gather_2) { gather<uint16>(work); }
KERNEL(gather_4) { gather<uint32>(work); }
KERNEL(gather_8) { gather<uint64>(work); }
KERNEL(gather_16) { gather<chunk>(work); }
