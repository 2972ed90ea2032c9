// Delta ops over the rows of a mixed batch, on a CPU: each adapter's rows, and no others, are read and written.
//
// A call serves one module and all adapters of the step. `Rows` says which rows belong to which slot; a `Table` of int64
// (pointers and sizes, one entry a slot) says what the slot holds. A row's result depends on that row alone, and every sum
// is taken in one order whatever the batch looks like, so that a mixed batch equals each request alone, bit for bit.
//
// Two element types: float, and bfloat16 with float32 accumulation (AVX512-BF16 dot products where the machine has them).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rows.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_BF16_DOT 1
#include <immintrin.h>
#endif

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

constexpr int kRowTile = 4;       // rows that share one pass over a slot's factors
constexpr int kColumnChunk = 512; // output columns of one task
constexpr int kLanes = 16;        // columns of one block of packed expand factors
constexpr int64_t kParallelWork = 1 << 18;  // multiply-adds below which threads cost more than they save
constexpr int64_t kParallelTouch = 1 << 16; // the same, in elements that are read, changed and written

struct Tile {
    int slot;
    int count;
    int rows[kRowTile];
};

// Entry of the table, by slot and part. Pointers are 0 where the slot has nothing.
enum Field : int { kDown, kUp, kRank, kDownBias, kUpBias, kActivation, kInput, kEntry };
enum Input : int64_t { kFromX, kFromY, kFromSum };
enum Activation : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu };

inline float activate(int64_t kind, float v) {
    switch (kind) {
        case kRelu: return v > 0 || std::isnan(v) ? v : 0.0f;
        case kGelu: return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
        case kGeluTanh: return 0.5f * v * (1.0f + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
        case kSilu: return v / (1.0f + std::exp(-v));
        case kTanh: return std::tanh(v);
        case kSigmoid: return 1.0f / (1.0f + std::exp(-v));
        case kLeakyRelu: return v > 0 ? v : 0.01f * v;
        default: return v;
    }
}

inline int64_t even(int64_t n) { return (n + 1) & ~int64_t(1); }

// Dot products of `NR` rows with `NK` rows of `a` [rank, width]: h[row][k] += x[row] . a[k].
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

template <int NR, int NK> void dots(const bf16* const* x, const bf16* a, int64_t width, float* h, int64_t stride) {
#ifdef HAVE_BF16_DOT
    __m512 sum[NR][NK];
    for (auto& row : sum)
        for (auto& value : row) value = _mm512_setzero_ps();
    auto step = [&](int64_t i, __mmask32 mask) {
        __m512bh right[NK];
        for (int k = 0; k < NK; ++k) right[k] = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + k * width + i);
        for (int r = 0; r < NR; ++r) {
            const __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[r] + i);
            for (int k = 0; k < NK; ++k) sum[r][k] = _mm512_dpbf16_ps(sum[r][k], left, right[k]);
        }
    };
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) step(i, ~__mmask32(0));
    if (i < width) step(i, (__mmask32(1) << (width - i)) - 1);
    for (int r = 0; r < NR; ++r)
        for (int k = 0; k < NK; ++k) h[r * stride + k] = _mm512_reduce_add_ps(sum[r][k]);
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
// even(rank) values a row, the odd one zero. `from` is a multiple of 16.
template <int NR>
void expand_rows(bf16* const* y, const float* h, int64_t stride, const bf16* b, int64_t rank, int64_t size,
                 const float* bias, int64_t from, int64_t to) {
    const int64_t pairs = even(rank) / 2, block = pairs * 2 * kLanes;
#ifdef HAVE_BF16_DOT
    uint32_t packed[NR][256];  // pairs of h as bfloat16, 512 ranks at a time
    for (int64_t base = 0; base < pairs; base += 256) {
        const int64_t some = pairs - base < 256 ? pairs - base : 256;
        for (int r = 0; r < NR; ++r)
            for (int64_t p = 0; p < some; ++p) {
                const float* pair = h + r * stride + 2 * (base + p);
                packed[r][p] = narrow<bf16>(pair[0]).bits | uint32_t(narrow<bf16>(pair[1]).bits) << 16;
            }
        auto columns = [&](int64_t c, auto blocks, auto tail) {
            constexpr int N = decltype(blocks)::value;
            const __mmask16 mask = decltype(tail)::value ? (__mmask16)((1u << (to - c)) - 1) : (__mmask16)0xffff;
            __m512 sum[NR][N];
            for (int r = 0; r < NR; ++r)
                for (int n = 0; n < N; ++n) {
                    const __m256i raw = decltype(tail)::value ? _mm256_maskz_loadu_epi16(mask, y[r] + c + n * kLanes)
                                                             : _mm256_loadu_si256((const __m256i*)(y[r] + c + n * kLanes));
                    sum[r][n] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
                    if (bias && base == 0)
                        sum[r][n] = _mm512_add_ps(sum[r][n], _mm512_maskz_loadu_ps(mask, bias + c + n * kLanes));
                }
            const bf16* factors = b + c / kLanes * block + base * 2 * kLanes;
            for (int64_t p = 0; p < some; ++p) {
                __m512bh right[N];
                for (int n = 0; n < N; ++n) right[n] = (__m512bh)_mm512_loadu_si512(factors + n * block + p * 2 * kLanes);
                for (int r = 0; r < NR; ++r) {
                    const __m512bh left = (__m512bh)_mm512_set1_epi32((int)packed[r][p]);
                    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], left, right[n]);
                }
            }
            for (int r = 0; r < NR; ++r)
                for (int n = 0; n < N; ++n) {
                    const __m256i out = (__m256i)_mm512_cvtneps_pbh(sum[r][n]);
                    if (decltype(tail)::value)
                        _mm256_mask_storeu_epi16(y[r] + c + n * kLanes, mask, out);
                    else
                        _mm256_storeu_si256((__m256i*)(y[r] + c + n * kLanes), out);
                }
        };
        int64_t c = from;
        for (; c + 4 * kLanes <= to; c += 4 * kLanes) columns(c, std::integral_constant<int, 4>{}, std::false_type{});
        for (; c + kLanes <= to; c += kLanes) columns(c, std::integral_constant<int, 1>{}, std::false_type{});
        if (c < to) columns(c, std::integral_constant<int, 1>{}, std::true_type{});
    }
#else
    for (int r = 0; r < NR; ++r)
        for (int64_t c = from; c < to; c += kLanes) {
            const int64_t some = to - c < kLanes ? to - c : kLanes;
            float sum[kLanes];
            for (int64_t n = 0; n < some; ++n) sum[n] = widen(y[r][c + n]) + (bias ? bias[c + n] : 0.0f);
            const bf16* factors = b + c / kLanes * block;
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

// Rows by their distance in memory, in elements.
template <typename T> struct Matrix {
    T* data;
    int64_t stride;
    T* row(int64_t at) const { return data + at * stride; }
};

// The entries of one slot, one a part.
const int64_t* entries_of(const Table& table, int slot, int entry_size) {
    return table.entries + slot * table.num_parts * entry_size;
}

const std::vector<Tile>& tiles_of(const Table& table, const Rows& rows) {
    thread_local std::vector<Tile> tiles;
    tiles.clear();
    for (int s = 0; s < rows.segments; ++s) {
        if (!has(*table.held, rows.slot[s])) continue;
        for (int at = rows.start[s]; at < rows.start[s + 1]; at += kRowTile) {
            Tile tile{rows.slot[s], 0, {}};
            while (tile.count < kRowTile && at + tile.count < rows.start[s + 1]) {
                tile.rows[tile.count] = rows.row[at + tile.count];
                ++tile.count;
            }
            tiles.push_back(tile);
        }
    }
    return tiles;
}

// The hidden values of one tile: h[row][offset of part + k]. What the input code names is read from x, y or their sum.
template <typename T>
void shrink_tile(const Table& table, const Tile& tile, Matrix<const T> x, Matrix<T> y, float* h, int64_t stride) {
    thread_local std::vector<T> sums;
    const int64_t* entry = entries_of(table, tile.slot, kEntry);
    for (int64_t p = 0; p < table.num_parts; ++p, entry += kEntry) {
        const int64_t rank = entry[kRank];
        if (!rank) continue;
        const T* from[kRowTile];
        if (entry[kInput] == kFromSum) sums.resize(kRowTile * table.width);
        for (int r = 0; r < tile.count; ++r) {
            const T *row_x = x.row(tile.rows[r]), *row_y = y.row(tile.rows[r]);
            from[r] = entry[kInput] == kFromY ? row_y : row_x;
            if (entry[kInput] == kFromSum) {
                T* sum = sums.data() + r * table.width;
                for (int64_t i = 0; i < table.width; ++i) sum[i] = narrow<T>(widen(row_x[i]) + widen(row_y[i]));
                from[r] = sum;
            }
        }
        shrink(from, tile.count, reinterpret_cast<const T*>(entry[kDown]), rank, table.width, h, stride);
        const float* bias = reinterpret_cast<const float*>(entry[kDownBias]);
        for (int r = 0; r < tile.count; ++r) {
            float* own = h + r * stride;
            if (bias || entry[kActivation])
                for (int64_t k = 0; k < rank; ++k)
                    own[k] = activate(entry[kActivation], own[k] + (bias ? bias[k] : 0.0f));
            if (rank & 1) own[rank] = 0;
        }
        h += even(rank);
    }
}

// Columns [from, to) of one part, of one tile; h as `shrink_tile` leaves it.
template <typename T>
void expand_tile(const Table& table, const Tile& tile, Matrix<T> y, const float* h, int64_t stride, int part, int64_t from,
                 int64_t to) {
    const int64_t* entry = entries_of(table, tile.slot, kEntry);
    for (int p = 0; p < part; ++p, entry += kEntry) h += even(entry[kRank]);
    if (!entry[kRank]) return;
    T* rows[kRowTile];
    for (int r = 0; r < tile.count; ++r) rows[r] = y.row(tile.rows[r]) + table.parts[part].first;
    expand(rows, tile.count, h, stride, reinterpret_cast<const T*>(entry[kUp]), entry[kRank],
           int64_t(table.parts[part].size), reinterpret_cast<const float*>(entry[kUpBias]), from, to);
}

inline int64_t chunks_of(const Part& part) { return (part.size + kColumnChunk - 1) / kColumnChunk; }

template <typename T> void shrink_expand(const Table& table, const Rows& rows, Matrix<const T> x, Matrix<T> y) {
    const std::vector<Tile>& tiles = tiles_of(table, rows);
    int64_t stride = 0, work = 0, chunks = 0;
    for (const Tile& tile : tiles) {
        const int64_t* entry = entries_of(table, tile.slot, kEntry);
        int64_t ranks = 0;
        for (int64_t p = 0; p < table.num_parts; ++p, entry += kEntry) {
            ranks += even(entry[kRank]);
            work += even(entry[kRank]) * (table.width + table.parts[p].size) * tile.count;
        }
        stride = ranks > stride ? ranks : stride;
    }
    for (int64_t p = 0; p < table.num_parts; ++p) chunks += chunks_of(table.parts[p]);
    thread_local std::vector<float> scratch;
    scratch.resize(tiles.size() * kRowTile * stride);
    float* hidden = scratch.data();
    const int64_t num_tiles = int64_t(tiles.size());
    const Tile* const tile = tiles.data();
    // Threads share first the tiles, then the columns of each: a step of few rows has few tiles, but always many columns.
#pragma omp parallel if (work > kParallelWork)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < num_tiles; ++t)
            shrink_tile(table, tile[t], x, y, hidden + t * kRowTile * stride, stride);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_tiles * chunks; ++task) {
            const int64_t t = task / chunks;
            int64_t chunk = task % chunks;
            int part = 0;
            for (; chunk >= chunks_of(table.parts[part]); ++part) chunk -= chunks_of(table.parts[part]);
            const int64_t from = chunk * kColumnChunk, end = from + kColumnChunk, size = table.parts[part].size;
            expand_tile(table, tile[t], y, hidden + t * kRowTile * stride, stride, part, from, end < size ? end : size);
        }
    }
}

struct Row {
    int slot;
    int row;
};

const std::vector<Row>& rows_of(const Table& table, const Rows& rows) {
    thread_local std::vector<Row> own;
    own.clear();
    for (int s = 0; s < rows.segments; ++s) {
        if (!has(*table.held, rows.slot[s])) continue;
        for (int at = rows.start[s]; at < rows.start[s + 1]; ++at) own.push_back({rows.slot[s], rows.row[at]});
    }
    return own;
}

// y[row] = y[row] * factor + bias, either of them absent; vectors are float [columns of the part].
template <typename T> void affine(const Table& table, const Rows& rows, Matrix<T> y) {
    const std::vector<Row>& own = rows_of(table, rows);
    const Row* const first = own.data();
    const int64_t count = int64_t(own.size());
#pragma omp parallel for schedule(static) if (count * y.stride >= kParallelTouch)
    for (int64_t at = 0; at < count; ++at) {
        const int64_t* entry = entries_of(table, first[at].slot, 2);
        for (int64_t p = 0; p < table.num_parts; ++p, entry += 2) {
            const float *factor = reinterpret_cast<const float*>(entry[0]), *bias = reinterpret_cast<const float*>(entry[1]);
            T* out = y.row(first[at].row) + table.parts[p].first;
            const int64_t size = table.parts[p].size;
            if (factor && bias)
#pragma omp simd
                for (int64_t c = 0; c < size; ++c) out[c] = narrow<T>(widen(out[c]) * factor[c] + bias[c]);
            else if (factor)
#pragma omp simd
                for (int64_t c = 0; c < size; ++c) out[c] = narrow<T>(widen(out[c]) * factor[c]);
            else if (bias)
#pragma omp simd
                for (int64_t c = 0; c < size; ++c) out[c] = narrow<T>(widen(out[c]) + bias[c]);
        }
    }
}

// y[row] += normalise(x[row]) * weight + bias, either of them absent; a layer norm centres first.
template <typename T> void norm_affine(const Table& table, const Rows& rows, Matrix<const T> x, Matrix<T> y) {
    const std::vector<Row>& own = rows_of(table, rows);
    const Row* const first = own.data();
    const int64_t count = int64_t(own.size()), width = table.width;
#pragma omp parallel for schedule(static) if (count * width > kParallelWork)
    for (int64_t at = 0; at < count; ++at) {
        const int64_t* entry = entries_of(table, first[at].slot, 2);
        const float *weight = reinterpret_cast<const float*>(entry[0]), *bias = reinterpret_cast<const float*>(entry[1]);
        const T* in = x.row(first[at].row);
        T* out = y.row(first[at].row);
        float mean = 0, square = 0;
        if (table.centred) {
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < width; ++i) mean += widen(in[i]);
            mean /= float(width);
        }
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; ++i) square += (widen(in[i]) - mean) * (widen(in[i]) - mean);
        const float rate = 1.0f / std::sqrt(square / float(width) + float(table.eps));
        for (int64_t i = 0; i < width; ++i) {
            const float change = (weight ? (widen(in[i]) - mean) * rate * weight[i] : 0.0f) + (bias ? bias[i] : 0.0f);
            // The change is rounded before it is added, as a tensor of the base's dtype would be.
            out[i] = narrow<T>(widen(out[i]) + widen(narrow<T>(change)));
        }
    }
}

template <typename T> void apply(const Table& table, const Rows& rows, Matrix<const T> x, Matrix<T> y) {
    switch (table.kernel) {
        case kShrinkExpand: return shrink_expand(table, rows, x, y);
        case kAffine: return affine(table, rows, y);
        case kNormAffine: return norm_affine(table, rows, x, y);
    }
}

template <typename T>
void apply_as(const Table& table, const Rows& rows, const void* x, int64_t x_stride, void* y, int64_t y_stride) {
    apply<T>(table, rows, {static_cast<const T*>(x), x_stride}, {static_cast<T*>(y), y_stride});
}

}  // namespace

extern "C" void deltamux_apply(const Table* table, const Rows* rows, const void* x, int64_t x_stride, void* y,
                               int64_t y_stride) {
    (table->bfloat ? apply_as<bf16> : apply_as<float>)(*table, *rows, x, x_stride, y, y_stride);
}
