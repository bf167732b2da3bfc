// Compressed gradients: the formats are described in docs/kernels.md, what is done in ../reference.py. Follows kernels.cu.
//
// The gradient is the first address, the residual the value, the codes are the target, or to decompress the value.
// To compress, a warp does some blocks at a time: it loads them, in order, and what all its lanes must know of each
// other, a mask, a sum or a maximum, goes from lane to lane without waiting.

#ifdef __CUDACC__
// What a lane has of its own; `l` is its number, and what stands after EACH_LANE is done by each.
template <class T> struct Lanes {
    T own;
    INLINE T& operator[](int) { return own; }
};
#define EACH_LANE(l) for (int l = threadIdx.x % 32, l##_left = 1; l##_left; l##_left = 0)
INLINE bool leads() { return true; }
INLINE uint32 mask(const Lanes<bool>& x) { return __ballot_sync(0xFFFFFFFFu, x.own); }
INLINE float sum(const Lanes<float>& x) {  // the second half of the lanes is added to the first, until one is left
    float total = x.own;
#pragma unroll
    for (int half = 16; half; half /= 2) total = total + __shfl_down_sync(0xFFFFFFFFu, total, half);
    return __shfl_sync(0xFFFFFFFFu, total, 0);
}
INLINE uint32 largest(const Lanes<uint32>& x) {
    uint32 most = x.own;
#pragma unroll
    for (int half = 16; half; half /= 2) {
        uint32 other = __shfl_xor_sync(0xFFFFFFFFu, most, half);
        most = other > most ? other : most;
    }
    return most;
}
#endif

INLINE int64 warp() { return thread() / 32; }
INLINE int64 warps() { return threads() / 32; }

INLINE float no_number() { return from_bits(0x7FC00000); }

// Gradient and residual together; behind the end zero.
template <class P> INLINE float compensated(const Work& work, int64 i) {
    return i < work.size ? widen(((const P*)address(work, 0))[i]) + ((const float*)work.value)[i] : 0.0f;
}
INLINE void leave(const Work& work, int64 i, float rest) {
    if (i < work.size) ((float*)work.value)[i] = rest;
}

// --- 2bit: 32 elements are two words, which of them are far from zero and which are below or no number --------------

template <class P> INLINE void quantize_2bit(const Work& work) {
    const int ROWS = 16;  // so that the codes of a warp are 32 words
    if (!leads()) return;
    float high = (float)work.numbers[0];
    for (int64 at = warp() * ROWS * 32; at < work.size; at += warps() * ROWS * 32) {
        Lanes<float> x[ROWS];
        Lanes<uint32> codes = {};
#pragma unroll
        for (int k = 0; k < ROWS; k++) EACH_LANE(l) x[k][l] = compensated<P>(work, at + 32 * k + l);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            Lanes<bool> far, below;
            EACH_LANE(l) {
                far[l] = x[k][l] >= high || x[k][l] <= -high;
                below[l] = !(x[k][l] > -high);
                leave(work, at + 32 * k + l, x[k][l] - (far[l] ? below[l] ? -high : high : 0.0f));
            }
            uint32 first = mask(far), second = mask(below);
            EACH_LANE(l) if (l / 2 == k) codes[l] = l % 2 ? second : first;
        }
        int64 words = (work.size - at + 31) / 32 * 2;
        EACH_LANE(l) if (l < words) ((uint32*)work.target)[at / 16 + l] = codes[l];
    }
}

struct Dequantize2bit {
    template <int N> static INLINE void run(const Work& work, int64 i) {
        const uint32* words = (const uint32*)work.value + i / 32 * 2;
        uint32 far = words[0] >> i % 32, below = words[1] >> i % 32;
        float high = (float)work.numbers[0];
        Pack<float, N> out;
#pragma unroll
        for (int j = 0; j < N; j++) {
            bool minus = below >> j & 1;
            out.at[j] = far >> j & 1 ? minus ? -high : high : minus ? no_number() : 0.0f;
        }
        store(work.target, i, out);
    }
};

// --- 1bit: 1,024 elements are a scale and 32 words, which of them are below zero ------------------------------------

template <class P> INLINE void quantize_1bit(const Work& work) {
    const int ROWS = 32, BLOCK = 32 * ROWS;
    if (!leads()) return;
    for (int64 at = warp() * BLOCK; at < work.size; at += warps() * BLOCK) {
        Lanes<float> x[ROWS], total = {};
        Lanes<uint32> codes = {};
#pragma unroll
        for (int k = 0; k < ROWS; k++) EACH_LANE(l) x[k][l] = compensated<P>(work, at + 32 * k + l);
#pragma unroll
        for (int k = 0; k < ROWS; k++) EACH_LANE(l) total[l] = total[l] + magnitude(x[k][l]);
        int64 size = work.size - at < BLOCK ? work.size - at : BLOCK, words = (size + 31) / 32;
        float scale = sum(total) / (float)size;
        if (scale != scale) scale = no_number();
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            Lanes<bool> below;
            EACH_LANE(l) {
                below[l] = x[k][l] < 0;
                leave(work, at + 32 * k + l, x[k][l] - (below[l] ? -scale : scale));
            }
            uint32 all = mask(below);
            EACH_LANE(l) if (l == k) codes[l] = all;
        }
        uint32* out = (uint32*)work.target + at / BLOCK * (1 + ROWS);
        EACH_LANE(l) {
            if (l == 0) out[0] = to_bits(scale);
            if (l < words) out[1 + l] = codes[l];
        }
    }
}

struct Dequantize1bit {
    template <int N> static INLINE void run(const Work& work, int64 i) {
        const uint32* words = (const uint32*)work.value + i / 1024 * 33;
        uint32 below = words[1 + i % 1024 / 32] >> i % 32;
        float scale = from_bits(words[0]);
        Pack<float, N> out;
#pragma unroll
        for (int j = 0; j < N; j++) out.at[j] = below >> j & 1 ? -scale : scale;
        store(work.target, i, out);
    }
};

// --- int8: 256 elements are a scale and 256 bytes, how many of it each is -------------------------------------------

template <class P> INLINE void quantize_int8(const Work& work) {
    const int ROWS = 8, BLOCK = 32 * ROWS;
    if (!leads()) return;
    for (int64 at = warp() * BLOCK; at < work.size; at += warps() * BLOCK) {
        Lanes<float> x[ROWS];
        Lanes<uint32> most = {};
#pragma unroll
        for (int k = 0; k < ROWS; k++)
            EACH_LANE(l) {
                x[k][l] = compensated<P>(work, at + 32 * k + l);
                uint32 bits = to_bits(x[k][l]) & 0x7FFFFFFF;
                most[l] = bits > most[l] ? bits : most[l];
            }
        uint32 magnitude = largest(most);
        bool finite = magnitude < 0x7F800000;
        float inverse = 127.0f / from_bits(magnitude);
        bool any = finite && to_bits(inverse) < 0x7F800000;
        float scale = any ? from_bits(magnitude) / 127.0f : finite ? 0.0f : no_number();
        unsigned char* out = (unsigned char*)work.target + at / BLOCK * (4 + BLOCK);
        EACH_LANE(l) if (l == 0) *(uint32*)out = to_bits(scale);
        int64 bytes = (work.size - at + 3) / 4 * 4;
#pragma unroll
        for (int k = 0; k < ROWS; k++)
            EACH_LANE(l) {
                float steps = any ? rintf(x[k][l] * inverse) + 0.0f : 0.0f;
                leave(work, at + 32 * k + l, x[k][l] - steps * scale);
                if (32 * k + l < bytes) out[4 + 32 * k + l] = (unsigned char)(signed char)(int)steps;
            }
    }
}

struct DequantizeInt8 {
    template <int N> static INLINE void run(const Work& work, int64 i) {
        const unsigned char* block = (const unsigned char*)work.value + i / 256 * 260;
        Pack<signed char, N> steps = load<signed char, N>(block + 4, i % 256);
        float scale = from_bits(*(const uint32*)block);
        Pack<float, N> out;
#pragma unroll
        for (int j = 0; j < N; j++) out.at[j] = (float)steps.at[j] * scale;
        store(work.target, i, out);
    }
};

#define QUANTIZE_OF(name, P)                                                    \
    KERNEL(quantize_2bit_##name) { quantize_2bit<P>(work); }                    \
    KERNEL(quantize_1bit_##name) { quantize_1bit<P>(work); }                    \
    KERNEL(quantize_int8_##name) { quantize_int8<P>(work); }
QUANTIZE_OF(f4, float)
QUANTIZE_OF(half, half)
QUANTIZE_OF(brain, brain)

KERNEL(dequantize_2bit) { each<Dequantize2bit, 4>(work); }
KERNEL(dequantize_1bit) { each<Dequantize1bit, 4>(work); }
KERNEL(dequantize_int8) { each<DequantizeInt8, 4>(work); }
