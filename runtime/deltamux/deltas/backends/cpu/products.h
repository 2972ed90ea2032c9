// Products of a few rows with the two factors of a low-rank change, in float or bfloat16 with float32 accumulation.
//
// AVX512 takes 32 bfloat16 at a time: where a dot product of pairs is slower than the two multiply-adds that it replaces,
// as on Intel's cores, by these. Every sum is taken in one order, whatever else is computed.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_BF16 1
#include <immintrin.h>
#if defined(__AMX_BF16__)  // Intel's, where a dot product takes two cycles and a multiply-add half a one
#define HAVE_FAST_FMA 1
#endif
#endif

// Sums stay in registers only if every loop over them is unrolled, and what holds them inlined.
#define UNROLL _Pragma("GCC unroll 16")
#define KERNEL inline __attribute__((always_inline))

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <typename T> T narrow(float value);
template <> inline float narrow<float>(float value) { return value; }
template <> inline bf16 narrow<bf16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};  // NaN stays NaN
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};                  // nearest, ties to even
}

constexpr int kRowTile = 4;  // rows that share one pass over a slot's factors
constexpr int kLanes = 16;   // columns of one block of packed expand factors

inline int64_t even(int64_t n) { return (n + 1) & ~int64_t(1); }

// Dot products of `NR` rows with `NK` rows of `a` [rank, width]: h[row][k] = x[row] . a[k].
template <int NR, int NK> void dots(const float* const* x, const float* a, int64_t width, float* h, int64_t stride) {
    for (int r = 0; r < NR; ++r)
        for (int k = 0; k < NK; ++k) {
            const float *left = x[r], *right = a + k * width;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += left[i] * right[i];
            h[r * stride + k] = sum;
        }
}

#ifdef HAVE_BF16
// 16 pairs of bfloat16, as one of two factors that are multiplied element by element, and each pair's products added.
struct Pairs {
#ifdef HAVE_FAST_FMA
    __m512 first, second;

    static Pairs of(__m512i raw) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(0xffff0000)))};
    }
    // The same pair of float 16 times.
    static Pairs repeated(const float* pair) { return {_mm512_set1_ps(pair[0]), _mm512_set1_ps(pair[1])}; }
    static void prepare(float*) {}
    __m512 times(Pairs other, __m512 sum) const {
        return _mm512_fmadd_ps(second, other.second, _mm512_fmadd_ps(first, other.first, sum));
    }
#else
    __m512bh pairs;

    static Pairs of(__m512i raw) { return {(__m512bh)raw}; }
    static Pairs repeated(const float* pair) {
        int32_t both;
        std::memcpy(&both, pair, sizeof both);
        return {(__m512bh)_mm512_set1_epi32(both)};
    }
    // Rounds a pair once, to be repeated often: its bits are in the first float.
    static void prepare(float* pair) {
        const uint32_t both = narrow<bf16>(pair[0]).bits | uint32_t(narrow<bf16>(pair[1]).bits) << 16;
        std::memcpy(pair, &both, sizeof both);
    }
    __m512 times(Pairs other, __m512 sum) const { return _mm512_dpbf16_ps(sum, pairs, other.pairs); }
#endif
};
#endif

template <int NR, int NK> void dots(const bf16* const* x, const bf16* a, int64_t width, float* h, int64_t stride) {
#ifdef HAVE_BF16
    __m512 sum[NR][NK];
    UNROLL for (int r = 0; r < NR; ++r)
        UNROLL for (int k = 0; k < NK; ++k) sum[r][k] = _mm512_setzero_ps();
    auto step = [&](int64_t i, __mmask32 mask) __attribute__((always_inline)) {
        Pairs right[NK];
        UNROLL for (int k = 0; k < NK; ++k) right[k] = Pairs::of(_mm512_maskz_loadu_epi16(mask, a + k * width + i));
        UNROLL for (int r = 0; r < NR; ++r) {
            const Pairs left = Pairs::of(_mm512_maskz_loadu_epi16(mask, x[r] + i));
            UNROLL for (int k = 0; k < NK; ++k) sum[r][k] = left.times(right[k], sum[r][k]);
        }
    };
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) step(i, ~__mmask32(0));
    if (i < width) step(i, (__mmask32(1) << (width - i)) - 1);
    UNROLL for (int r = 0; r < NR; ++r)
        UNROLL for (int k = 0; k < NK; ++k) h[r * stride + k] = _mm512_reduce_add_ps(sum[r][k]);
#else
    for (int r = 0; r < NR; ++r)
        for (int k = 0; k < NK; ++k) {
            const bf16 *left = x[r], *right = a + k * width;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += widen(left[i]) * widen(right[i]);
            h[r * stride + k] = sum;
        }
#endif
}

template <int NR, typename T>
void shrink_rows(const T* const* x, const T* a, int64_t rank, int64_t width, float* h, int64_t stride) {
    constexpr int kWide = NR == 1 ? 8 : 4;  // enough independent sums to hide the latency of a dot product
    int64_t k = 0;
    for (; k + kWide <= rank; k += kWide) dots<NR, kWide>(x, a + k * width, width, h + k, stride);
    for (; k + 2 <= rank; k += 2) dots<NR, 2>(x, a + k * width, width, h + k, stride);
    for (; k < rank; ++k) dots<NR, 1>(x, a + k * width, width, h + k, stride);
}

// h[row][k] = x[row] . a[k] for up to kRowTile rows.
template <typename T>
void shrink(const T* const* x, int count, const T* a, int64_t rank, int64_t width, float* h, int64_t stride) {
    switch (count) {
        case 1: return shrink_rows<1>(x, a, rank, width, h, stride);
        case 2: return shrink_rows<2>(x, a, rank, width, h, stride);
        case 3: return shrink_rows<3>(x, a, rank, width, h, stride);
        default: return shrink_rows<4>(x, a, rank, width, h, stride);
    }
}

#ifdef HAVE_BF16
// N blocks of columns of NR rows of y += h @ b (+ bias); `mask` has the columns of a block that exist. `b` and `bias` are
// those of the first column.
template <int NR, int N, bool kBias>
KERNEL void expand_blocks(bf16* const* y, int64_t column, const float* h, int64_t stride, const bf16* b, int64_t pairs,
                          const float* bias, __mmask16 mask) {
    __m512 sum[NR][N];
    UNROLL for (int n = 0; n < N; ++n) {
        __m512 start;
        if constexpr (kBias) start = _mm512_maskz_loadu_ps(mask, bias + n * kLanes);
        UNROLL for (int r = 0; r < NR; ++r) {
            const __m256i raw = _mm256_maskz_loadu_epi16(mask, y[r] + column + n * kLanes);
            sum[r][n] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
            if constexpr (kBias) sum[r][n] = _mm512_add_ps(sum[r][n], start);
        }
    }
    for (int64_t p = 0; p < pairs; ++p) {
        Pairs right[N];
        UNROLL for (int n = 0; n < N; ++n) right[n] = Pairs::of(_mm512_loadu_si512(b + (n * pairs + p) * 2 * kLanes));
        UNROLL for (int r = 0; r < NR; ++r) {
            const Pairs left = Pairs::repeated(h + r * stride + 2 * p);
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = left.times(right[n], sum[r][n]);
        }
    }
    UNROLL for (int n = 0; n < N; ++n)
        UNROLL for (int r = 0; r < NR; ++r)
            _mm256_mask_storeu_epi16(y[r] + column + n * kLanes, mask, (__m256i)_mm512_cvtneps_pbh(sum[r][n]));
}

template <int NR, bool kBias>
KERNEL void expand_columns(bf16* const* y, const float* h, int64_t stride, const bf16* b, int64_t pairs,
                           const float* bias, int64_t from, int64_t to) {
    constexpr int kWide = 4;  // blocks whose sums fit the registers, for kRowTile rows
    const int64_t block = pairs * 2 * kLanes;
    int64_t c = from;
    for (; c + kWide * kLanes <= to; c += kWide * kLanes)
        expand_blocks<NR, kWide, kBias>(y, c, h, stride, b + c / kLanes * block, pairs, bias + c, 0xffff);
    for (; c < to; c += kLanes) {
        const __mmask16 mask = to - c < kLanes ? (1u << (to - c)) - 1 : 0xffff;
        expand_blocks<NR, 1, kBias>(y, c, h, stride, b + c / kLanes * block, pairs, bias + c, mask);
    }
}
#endif

// Columns [from, to) of y[row] += h[row] @ b (+ bias). b in float is [rank, size].
template <int NR>
void expand_rows(float* const* y, const float* h, int64_t stride, const float* b, int64_t rank, int64_t size,
                 const float* bias, int64_t from, int64_t to) {
    for (int r = 0; r < NR; ++r) {
        float* out = y[r];
        if (bias)
#pragma omp simd
            for (int64_t c = from; c < to; ++c) out[c] += bias[c];
        for (int64_t k = 0; k < rank; ++k) {
            const float factor = h[r * stride + k];
            const float* row = b + k * size;
#pragma omp simd
            for (int64_t c = from; c < to; ++c) out[c] += factor * row[c];
        }
    }
}

// b in bfloat16 is packed [size / 16 up, rank / 2 up, 16 columns, 2 ranks], zero where there is no column or rank; h holds
// even(rank) values per row, the odd one zero, in pairs that are prepared. `from` is a multiple of 16.
template <int NR>
void expand_rows(bf16* const* y, const float* h, int64_t stride, const bf16* b, int64_t rank, int64_t size,
                 const float* bias, int64_t from, int64_t to) {
    const int64_t pairs = even(rank) / 2;
#ifdef HAVE_BF16
    (bias ? expand_columns<NR, true> : expand_columns<NR, false>)(y, h, stride, b, pairs, bias, from, to);
#else
    for (int r = 0; r < NR; ++r)
        for (int64_t c = from; c < to; c += kLanes) {
            const int64_t some = to - c < kLanes ? to - c : kLanes;
            float sum[kLanes];
            for (int64_t n = 0; n < some; ++n) sum[n] = widen(y[r][c + n]) + (bias ? bias[c + n] : 0.0f);
            const bf16* factors = b + c * pairs * 2;
            for (int64_t p = 0; p < pairs; ++p) {
                const float first = widen(narrow<bf16>(h[r * stride + 2 * p]));
                const float second = widen(narrow<bf16>(h[r * stride + 2 * p + 1]));
#pragma omp simd
                for (int64_t n = 0; n < some; ++n) {
                    const bf16* pair = factors + (p * kLanes + n) * 2;
                    sum[n] += first * widen(pair[0]) + second * widen(pair[1]);
                }
            }
            for (int64_t n = 0; n < some; ++n) y[r][c + n] = narrow<bf16>(sum[n]);
        }
#endif
}

template <typename T>
void expand(T* const* y, int count, const float* h, int64_t stride, const T* b, int64_t rank, int64_t size,
            const float* bias, int64_t from, int64_t to) {
    switch (count) {
        case 1: return expand_rows<1>(y, h, stride, b, rank, size, bias, from, to);
        case 2: return expand_rows<2>(y, h, stride, b, rank, size, bias, from, to);
        case 3: return expand_rows<3>(y, h, stride, b, rank, size, bias, from, to);
        default: return expand_rows<4>(y, h, stride, b, rank, size, bias, from, to);
    }
}

// Makes hidden values what `expand` reads.
template <typename T> void prepare(float* h, int64_t rank) {
#ifdef HAVE_BF16
    if (sizeof(T) == sizeof(bf16))
        for (int64_t k = 0; k < rank; k += 2) Pairs::prepare(h + k);
#endif
}

}  // namespace
