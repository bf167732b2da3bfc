// kernels.cu as a library for the processor: the threads of a kernel are run one after the other, the last one first.

#include <cmath>
#include <cstring>

struct Place { unsigned x; };
static thread_local Place threadIdx, blockIdx, blockDim, gridDim;

#define INLINE inline
#define KERNEL(name) extern "C" void name(const Work& work)

INLINE float from_half(unsigned short bits) {
    _Float16 number;
    std::memcpy(&number, &bits, 2);
    return (float)number;
}
INLINE unsigned short to_half(float number) {
    _Float16 rounded = (_Float16)number;
    unsigned short bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}
INLINE float from_bits(unsigned bits) {
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}
INLINE unsigned to_bits(float number) {
    unsigned bits;
    std::memcpy(&bits, &number, 4);
    return bits;
}

// A warp is done by its first thread, lane after lane.
template <class T> struct Lanes {
    T own[32];
    T& operator[](int l) { return own[l]; }
};
#define EACH_LANE(l) for (int l = 0; l < 32; l++)
INLINE bool leads() { return threadIdx.x % 32 == 0; }
INLINE unsigned mask(const Lanes<bool>& x) {
    unsigned bits = 0;
    EACH_LANE(l) bits |= (unsigned)x.own[l] << l;
    return bits;
}
INLINE float sum(Lanes<float> x) {
    for (int half = 16; half; half /= 2)
        for (int l = 0; l < half; l++) x[l] = x[l] + x[l + half];
    return x[0];
}
INLINE unsigned largest(Lanes<unsigned> x) {
    unsigned most = 0;
    EACH_LANE(l) most = x[l] > most ? x[l] : most;
    return most;
}

#include "kernels.cu"

extern "C" void run(void (*kernel)(const Work&), unsigned blocks, unsigned threads, const Work* work) {
    gridDim.x = blocks, blockDim.x = threads;
    for (unsigned block = blocks; block-- > 0;)
        for (unsigned thread = threads; thread-- > 0;) {
            blockIdx.x = block, threadIdx.x = thread;
            kernel(*work);
        }
}
