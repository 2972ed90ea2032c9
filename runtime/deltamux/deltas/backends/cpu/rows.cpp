// Delta ops over the rows of a mixed batch, on a CPU: each adapter's rows, and no others, are read and written.
//
// A call serves one module and all adapters of the step. `StepRows` is the step's rows by slot, `SlotParams` the parameters
// of every slot, as int64 words (pointers and sizes). A row's result depends on that row alone, and every sum
// is taken in one order whatever the batch is, so that a mixed batch equals each request alone, bit for bit.
//
// Two element types: float, and bfloat16 with float32 accumulation (products.h).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

#include "products.h"
#include "rows.h"

namespace {

constexpr int kColumnChunk = 512;  // output columns of one task
constexpr int kTilesPerThread = 2; // tiles from which on a thread gets whole ones
constexpr int kGroup = 4;          // tiles that share each chunk of columns, whose factors stay in the first cache
constexpr int64_t kParallelWork = 1 << 18;  // multiply-adds below which threads cost more than they save
constexpr int64_t kParallelTouch = 1 << 16; // the same, in elements that are read, changed and written

struct Tile {
    int slot;
    int count;
    int rows[kRowTile];
};

// The words of one slot at one slice. Pointers are 0 where the slot has no parameters.
enum Field : int { kDown, kUp, kRank, kDownBias, kUpBias, kActivation, kInput, kNumWords };
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

// Rows by their distance in memory, in elements.
template <typename T> struct Matrix {
    T* data;
    int64_t stride;
    T* row(int64_t at) const { return data + at * stride; }
};

// The words of one slot, slice after slice.
const int64_t* words_of(const SlotParams& params, int slot, int num_words) {
    return params.words + slot * params.num_slices * num_words;
}

const std::vector<Tile>& tiles_of(const SlotParams& params, const StepRows& rows) {
    thread_local std::vector<Tile> tiles;
    tiles.clear();
    for (int s = 0; s < rows.num_segments; ++s) {
        if (!has(*params.held, rows.slot[s])) continue;
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

// The hidden values of one tile: h[row][offset of slice + k]. What the input code names is read from x, y or their sum.
template <typename T>
void shrink_tile(const SlotParams& params, const Tile& tile, Matrix<const T> x, Matrix<T> y, float* h, int64_t stride) {
    thread_local std::vector<T> sums;
    const int64_t* words = words_of(params, tile.slot, kNumWords);
    for (int64_t p = 0; p < params.num_slices; ++p, words += kNumWords) {
        const int64_t rank = words[kRank];
        if (!rank) continue;
        const T* from[kRowTile];
        if (words[kInput] == kFromSum) sums.resize(kRowTile * params.width);
        for (int r = 0; r < tile.count; ++r) {
            const T *row_x = x.row(tile.rows[r]), *row_y = y.row(tile.rows[r]);
            from[r] = words[kInput] == kFromY ? row_y : row_x;
            if (words[kInput] == kFromSum) {
                T* sum = sums.data() + r * params.width;
                for (int64_t i = 0; i < params.width; ++i) sum[i] = narrow<T>(widen(row_x[i]) + widen(row_y[i]));
                from[r] = sum;
            }
        }
        shrink(from, tile.count, reinterpret_cast<const T*>(words[kDown]), rank, params.width, h, stride);
        const float* bias = reinterpret_cast<const float*>(words[kDownBias]);
        for (int r = 0; r < tile.count; ++r) {
            float* own = h + r * stride;
            if (bias || words[kActivation])
                for (int64_t k = 0; k < rank; ++k)
                    own[k] = activate(words[kActivation], own[k] + (bias ? bias[k] : 0.0f));
            if (rank & 1) own[rank] = 0;
            prepare<T>(own, rank);
        }
        h += even(rank);
    }
}

inline int64_t chunks_of(const ColumnRange& slice) { return (slice.size + kColumnChunk - 1) / kColumnChunk; }

int64_t chunks_of(const SlotParams& params) {
    int64_t chunks = 0;
    for (int64_t p = 0; p < params.num_slices; ++p) chunks += chunks_of(params.slices[p]);
    return chunks;
}

// One chunk of columns of one tile, counted over all slices; h as `shrink_tile` leaves it.
template <typename T>
void expand_tile(const SlotParams& params, const Tile& tile, Matrix<T> y, const float* h, int64_t stride, int64_t chunk) {
    const int64_t* words = words_of(params, tile.slot, kNumWords);
    const ColumnRange* slice = params.slices;
    for (; chunk >= chunks_of(*slice); ++slice, words += kNumWords) {
        chunk -= chunks_of(*slice);
        h += even(words[kRank]);
    }
    if (!words[kRank]) return;
    T* rows[kRowTile];
    for (int r = 0; r < tile.count; ++r) rows[r] = y.row(tile.rows[r]) + slice->first;
    const int64_t from = chunk * kColumnChunk, end = from + kColumnChunk, size = slice->size;
    expand(rows, tile.count, h, stride, reinterpret_cast<const T*>(words[kUp]), words[kRank], size,
           reinterpret_cast<const float*>(words[kUpBias]), from, end < size ? end : size);
}

// The work of a step at a module: at most `values` hidden values per row, and `work` multiply-adds in all.
struct Extent {
    int64_t values;
    int64_t work;
};

Extent extent_of(const SlotParams& params, const std::vector<Tile>& tiles) {
    Extent extent{0, 0};
    for (const Tile& tile : tiles) {
        const int64_t* words = words_of(params, tile.slot, kNumWords);
        int64_t values = 0;
        for (int64_t p = 0; p < params.num_slices; ++p, words += kNumWords) {
            values += even(words[kRank]);
            extent.work += even(words[kRank]) * (params.width + params.slices[p].size) * tile.count;
        }
        extent.values = values > extent.values ? values : extent.values;
    }
    return extent;
}

template <typename T> void shrink_expand(const SlotParams& params, const StepRows& rows, Matrix<const T> x, Matrix<T> y) {
    const std::vector<Tile>& tiles = tiles_of(params, rows);
    const Extent extent = extent_of(params, tiles);
    const int64_t num_tiles = int64_t(tiles.size()), chunks = chunks_of(params), stride = extent.values;
    thread_local std::vector<float> scratch;
    scratch.resize(num_tiles * kRowTile * stride);
    float* const hidden = scratch.data();
    const Tile* const tile = tiles.data();
    auto shrink_one = [&](int64_t t) { shrink_tile(params, tile[t], x, y, hidden + t * kRowTile * stride, stride); };
    auto expand_one = [&](int64_t t, int64_t chunk) {
        expand_tile(params, tile[t], y, hidden + t * kRowTile * stride, stride, chunk);
    };
    const bool parallel = extent.work > kParallelWork;
    const int threads = parallel ? omp_get_max_threads() : 1;
    if (num_tiles >= kTilesPerThread * threads) {
        // A thread does whole tiles, and the first that is awake begins: no thread waits for another until the end.
        const int64_t group = num_tiles >= 4 * kGroup * threads ? kGroup : 1;
#pragma omp parallel for schedule(dynamic) if (parallel)
        for (int64_t from = 0; from < num_tiles; from += group) {
            const int64_t to = from + group < num_tiles ? from + group : num_tiles;
            for (int64_t t = from; t < to; ++t) shrink_one(t);
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                for (int64_t t = from; t < to; ++t) expand_one(t, chunk);
        }
        return;
    }
    // Few tiles still have many columns: threads share first the tiles, then the columns of each.
#pragma omp parallel if (parallel)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < num_tiles; ++t) shrink_one(t);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_tiles * chunks; ++task) expand_one(task / chunks, task % chunks);
    }
}

struct Row {
    int slot;
    int row;
};

const std::vector<Row>& rows_of(const SlotParams& params, const StepRows& rows) {
    thread_local std::vector<Row> own;
    own.clear();
    for (int s = 0; s < rows.num_segments; ++s) {
        if (!has(*params.held, rows.slot[s])) continue;
        for (int at = rows.start[s]; at < rows.start[s + 1]; ++at) own.push_back({rows.slot[s], rows.row[at]});
    }
    return own;
}

// y[row] = y[row] * factor + bias, either of them absent; vectors are float [columns of the slice].
template <typename T> void affine(const SlotParams& params, const StepRows& rows, Matrix<T> y) {
    const std::vector<Row>& own = rows_of(params, rows);
    const Row* const first = own.data();
    const int64_t count = int64_t(own.size());
#pragma omp parallel for schedule(static) if (count * y.stride >= kParallelTouch)
    for (int64_t at = 0; at < count; ++at) {
        const int64_t* words = words_of(params, first[at].slot, 2);
        for (int64_t p = 0; p < params.num_slices; ++p, words += 2) {
            const float *factor = reinterpret_cast<const float*>(words[0]), *bias = reinterpret_cast<const float*>(words[1]);
            T* out = y.row(first[at].row) + params.slices[p].first;
            const int64_t size = params.slices[p].size;
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
template <typename T> void norm_affine(const SlotParams& params, const StepRows& rows, Matrix<const T> x, Matrix<T> y) {
    const std::vector<Row>& own = rows_of(params, rows);
    const Row* const first = own.data();
    const int64_t count = int64_t(own.size()), width = params.width;
#pragma omp parallel for schedule(static) if (count * width > kParallelWork)
    for (int64_t at = 0; at < count; ++at) {
        const int64_t* words = words_of(params, first[at].slot, 2);
        const float *weight = reinterpret_cast<const float*>(words[0]), *bias = reinterpret_cast<const float*>(words[1]);
        const T* in = x.row(first[at].row);
        T* out = y.row(first[at].row);
        float mean = 0, square = 0;
        if (params.centred) {
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < width; ++i) mean += widen(in[i]);
            mean /= float(width);
        }
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; ++i) square += (widen(in[i]) - mean) * (widen(in[i]) - mean);
        const float rate = 1.0f / std::sqrt(square / float(width) + float(params.eps));
        for (int64_t i = 0; i < width; ++i) {
            const float change = (weight ? (widen(in[i]) - mean) * rate * weight[i] : 0.0f) + (bias ? bias[i] : 0.0f);
            // The change is rounded before it is added, as a tensor of the base's dtype would be.
            out[i] = narrow<T>(widen(out[i]) + widen(narrow<T>(change)));
        }
    }
}

template <typename T> void apply(const SlotParams& params, const StepRows& rows, Matrix<const T> x, Matrix<T> y) {
    switch (params.kernel) {
        case kShrinkExpand: return shrink_expand(params, rows, x, y);
        case kAffine: return affine(params, rows, y);
        case kNormAffine: return norm_affine(params, rows, x, y);
    }
}

template <typename T>
void apply_as(const SlotParams& params, const StepRows& rows, const void* x, int64_t x_stride, void* y, int64_t y_stride) {
    apply<T>(params, rows, {static_cast<const T*>(x), x_stride}, {static_cast<T*>(y), y_stride});
}

}  // namespace

extern "C" void deltamux_apply(const SlotParams* params, const StepRows* rows, const void* x, int64_t x_stride, void* y,
                               int64_t y_stride) {
    (params->bfloat ? apply_as<bf16> : apply_as<float>)(*params, *rows, x, x_stride, y, y_stride);
}
