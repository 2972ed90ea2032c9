// The kernels' interface (rows.cpp): called by ctypes (slot_params.py), and by the engine's fast path.

#pragma once

#include <cstdint>

extern "C" {

// A set of slots: slot i is bit i % 64 of word i / 64.
struct Mask {
    const uint64_t* words;
    int64_t count;
};

// The rows of a step by slot: segment i holds rows row[start[i]] .. row[start[i + 1] - 1] of slot slot[i].
struct StepRows {
    int32_t num_segments;
    const int32_t* slot;
    const int32_t* start;
    const int32_t* row;
};

// The columns of y that belong to one slice of a packed module.
struct ColumnRange {
    int32_t first;  // column of y
    int32_t size;   // columns
};

enum Kernel : int64_t { kShrinkExpand, kAffine, kNormAffine };

// The parameters of all slots at one module, for one kernel: `words` holds pointers and sizes by slot and slice, in the
// kernel's order; pointers are 0 where the slot has none.
struct SlotParams {
    int64_t kernel;
    int64_t bfloat;   // elements of x and y: bfloat16, or else float
    int64_t width;    // columns of x, where the kernel reads it
    int64_t centred;  // kNormAffine: whether the norm subtracts the mean
    double eps;       // kNormAffine
    const Mask* held; // slots that have parameters; rows of others are left alone
    const int64_t* words;
    const ColumnRange* slices;
    int64_t num_slices;
};

// Changes y [rows, ...] of input x [rows, width] for the rows whose slot has parameters; strides are in elements, and the
// elements of a row adjoin.
void deltamux_apply(const SlotParams* params, const StepRows* rows, const void* x, int64_t x_stride, void* y, int64_t y_stride);
}

inline bool has(const Mask& mask, int64_t slot) {
    return slot / 64 < mask.count && (mask.words[slot / 64] >> (slot % 64) & 1);
}

inline bool meet(const Mask& a, const Mask& b) {
    const int64_t count = a.count < b.count ? a.count : b.count;
    for (int64_t i = 0; i < count; ++i)
        if (a.words[i] & b.words[i]) return true;
    return false;
}
