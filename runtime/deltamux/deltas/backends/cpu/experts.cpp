// The experts of a mixture: products with their weights in blocks of 16 outputs, as vLLM packs them for a CPU, and
// low-rank changes of rows that each have factors of their own. Every row's sums are taken in one order, whatever else is
// computed.

#include <algorithm>

#include "products.h"

// The factors of one row: a [rank, in], b [rank, out].
struct LowRankRow {
    const void* a;
    const void* b;
    int64_t rank;
    double scale;
    int64_t strides[2];  // from one expert's factors to the next's; both addresses are of the row's own
};

namespace {

constexpr int64_t kMaxRank = 256;  // inner values at once
constexpr int64_t kOutputs = 64;   // sums at once

// kTile rows share one pass over a block, each with kSums sums of kParts registers: as many as there are registers for.
// A multiply-add waits for the one before it in its sum, so that few sums leave the core idle.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kSums = 2, kTile = 8;
#else
constexpr int kWidth = 8, kSums = 1, kTile = 6;
#endif
constexpr int kParts = kLanes / kWidth;

using Floats = float __attribute__((vector_size(4 * kWidth)));

inline Floats load(const float* from) {
    Floats wide;
    std::memcpy(&wide, from, sizeof wide);
    return wide;
}
inline Floats load(const bf16* from) {
    using Bits = uint16_t __attribute__((vector_size(2 * kWidth)));
    using Words = uint32_t __attribute__((vector_size(4 * kWidth)));
    Bits bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

// Adds the products of one input of each row to the rows' sums of number `s`.
template <int NR, typename T>
KERNEL void add(const T* x, const T* w, int64_t in, Floats (&sum)[NR][kSums][kParts], int s) {
    UNROLL for (int p = 0; p < kParts; ++p) {
        const Floats wide = load(w + p * kWidth);
        UNROLL for (int r = 0; r < NR; ++r) sum[r][s][p] += widen(x[r * in]) * wide;
    }
}

// y[row] = w . x[row] for `NR` rows; w is one block [in, kLanes]. A row's sums are the same, however many rows there are.
template <int NR, typename T> void block(const T* x, const T* w, int64_t in, T* y, int64_t out) {
    Floats sum[NR][kSums][kParts];
    UNROLL for (int r = 0; r < NR; ++r)
        UNROLL for (int s = 0; s < kSums; ++s)
            UNROLL for (int p = 0; p < kParts; ++p) sum[r][s][p] = Floats{};
    int64_t i = 0;
    for (; i + kSums <= in; i += kSums)
        UNROLL for (int s = 0; s < kSums; ++s) add<NR, T>(x + i + s, w + (i + s) * kLanes, in, sum, s);
    for (; i < in; ++i) add<NR, T>(x + i, w + i * kLanes, in, sum, 0);
    for (int r = 0; r < NR; ++r)
        for (int c = 0; c < kLanes; ++c) {
            float total = sum[r][0][c / kWidth][c % kWidth];
            for (int s = 1; s < kSums; ++s) total += sum[r][s][c / kWidth][c % kWidth];
            y[r * out + c] = narrow<T>(total);
        }
}

template <typename T> void rows_of_block(const T* x, const T* w, int64_t in, T* y, int64_t out, int64_t count) {
    for (; count >= kTile; count -= kTile, x += kTile * in, y += kTile * out) block<kTile>(x, w, in, y, out);
    switch (count) {
        case 1: return block<1>(x, w, in, y, out);
        case 2: return block<2>(x, w, in, y, out);
        case 3: return block<3>(x, w, in, y, out);
        case 4: return block<4>(x, w, in, y, out);
        case 5: return block<5>(x, w, in, y, out);
        case 6: return block<6>(x, w, in, y, out);
        case 7: return block<7>(x, w, in, y, out);
    }
}

template <typename T>
void products(const T* x, int64_t in, const T* weights, int64_t out, const int64_t* starts, int64_t experts, T* y) {
    const int64_t blocks = out / kLanes;
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t task = 0; task < experts * blocks; ++task) {
        const int64_t expert = task / blocks, first = starts[expert], count = starts[expert + 1] - first;
        if (count)
            rows_of_block(x + first * in, weights + task * in * kLanes, in, y + first * out + task % blocks * kLanes, out,
                          count);
    }
}

// y += inner . b for a few outputs; b is [count, out].
template <typename T>
KERNEL void add_outputs(const float* inner, int64_t count, const T* b, int64_t out, T* y, int64_t outputs) {
    float sum[kOutputs] = {};
    for (int64_t k = 0; k < count; ++k)
#pragma omp simd
        for (int64_t o = 0; o < outputs; ++o) sum[o] += inner[k] * widen(b[k * out + o]);
    for (int64_t o = 0; o < outputs; ++o) y[o] = narrow<T>(widen(y[o]) + sum[o]);
}

template <typename T>
void low_rank(const T* x, int64_t in, T* y, int64_t out, int64_t rows, const LowRankRow* factors) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T *a = static_cast<const T*>(factors[row].a), *b = static_cast<const T*>(factors[row].b), *own = x + row * in;
        const int64_t rank = factors[row].rank;
        float inner[kMaxRank];
        for (int64_t first = 0; first < rank; first += kMaxRank) {
            const int64_t count = std::min<int64_t>(kMaxRank, rank - first);
            for (int64_t k = 0; k < count; ++k) {
                const T* left = a + (first + k) * in;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < in; ++i) sum += widen(left[i]) * widen(own[i]);
                inner[k] = sum * factors[row].scale;
            }
            for (int64_t o = 0; o < out; o += kOutputs)
                add_outputs(inner, count, b + first * out + o, out, y + row * out + o, std::min(kOutputs, out - o));
        }
    }
}

}  // namespace

extern "C" void deltamux_expert_products(const void* x, int64_t in, const void* weights, int64_t out,
                                         const int64_t* starts, int64_t experts, void* y, int64_t bfloat) {
    if (bfloat)
        products(static_cast<const bf16*>(x), in, static_cast<const bf16*>(weights), out, starts, experts,
                 static_cast<bf16*>(y));
    else
        products(static_cast<const float*>(x), in, static_cast<const float*>(weights), out, starts, experts,
                 static_cast<float*>(y));
}

extern "C" void deltamux_expert_low_rank(const void* x, int64_t in, void* y, int64_t out, int64_t rows,
                                         const LowRankRow* factors, int64_t bfloat) {
    if (bfloat)
        low_rank(static_cast<const bf16*>(x), in, static_cast<bf16*>(y), out, rows, factors);
    else
        low_rank(static_cast<const float*>(x), in, static_cast<float*>(y), out, rows, factors);
}
