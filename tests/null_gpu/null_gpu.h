/* What the files of the null GPU share. */
#ifndef NULL_GPU_H
#define NULL_GPU_H

#include <stdbool.h>
#include <stddef.h>

/* A GPU as its data sheet has it. */
struct gpu {
    const char *name;
    int sm; /* compute capability: 80 */
    int multiprocessors;
    size_t memory; /* bytes */
    int l2_cache;  /* bytes */
    int shared_memory_per_block; /* bytes, where a kernel asks for it */
    int shared_memory_per_multiprocessor;
    int memory_bus_width; /* bits */
    int clock_khz;
    int memory_clock_khz;
};

/* What was asked of the GPU since the process began. Python reads it: counts.py. */
struct counts {
    long kernels; /* launches, library calls that compute included */
    long waits;   /* of the host for the GPU */
};

extern struct counts null_gpu_counts;

const struct gpu *get_gpu(void);
int get_attribute(int attribute);

/* Device memory: address space that nobody may touch, the host included. NULL where the GPU is full. */
void *allocate(size_t bytes);
void release(void *pointer);
size_t get_free_memory(void);
bool is_on_device(const void *pointer);

/* Host memory that a real GPU could read by itself. */
void *allocate_pinned(size_t bytes);
void release_pinned(void *pointer);
bool is_pinned(const void *pointer);

/* From host to host it copies. What comes from the device is zeros; what goes there is gone. */
void copy(void *to, const void *from, size_t bytes);

/* A handle that is nobody else's. */
void *make_handle(void);

/* A function that the null GPU does not have: says so once, and returns CUDA's "not supported". */
int refuse(const char *function);
const char *get_refused(void);

#endif
