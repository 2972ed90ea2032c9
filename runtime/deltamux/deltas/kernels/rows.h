// What the kernels (rows.cpp) share with those that call them: Python by ctypes (tables.py), and the doors (doors.cpp).

#pragma once

#include <cstdint>

extern "C" {

// A set of slots: slot i is bit i % 64 of word i / 64.
struct Mask {
    const uint64_t* words;
    int64_t count;
};

// Rows of a step by slot: segment i holds rows row[start[i]] .. row[start[i + 1] - 1] of slot slot[i].
struct Rows {
    int32_t segments;
    const int32_t* slot;
    const int32_t* start;
    const int32_t* row;
};

// One part of a module: its columns of y. Every part of a slot has an entry in the module's table.
struct Part {
    int32_t first;  // column of y
    int32_t size;   // columns
};

enum Kernel : int64_t { kShrinkExpand, kAffine, kNormAffine };

// What a module's slots hold for one kernel, and how the kernel reads it. Pointers in entries are 0 for what is absent.
struct Table {
    int64_t kernel;
    int64_t bfloat;   // elements of x and y: bfloat16, or else float
    int64_t width;    // columns of x, where the kernel reads it
    int64_t centred;  // kNormAffine: whether the norm subtracts the mean
    double eps;       // kNormAffine
    const Mask* held; // slots that have an entry; rows of others are left alone
    const int64_t* entries;
    const Part* parts;
    int64_t num_parts;
};

// Changes y [rows, ...] of input x [rows, width] for the rows whose slot the table holds; strides are in elements, and the
// elements of a row adjoin.
void deltamux_apply(const Table* table, const Rows* rows, const void* x, int64_t x_stride, void* y, int64_t y_stride);
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
