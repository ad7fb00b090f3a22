/* The device itself: what it is, its memory, and what is counted. */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <cuda.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct counts null_gpu_counts;

static const struct gpu GPUS[] = {
    {"NVIDIA A100-SXM4-40GB", 80, 108, 42297786368, 40 << 20, 166912, 167936, 5120, 1410000, 1215000},
    {"NVIDIA H100 80GB HBM3", 90, 132, 85029158912, 50 << 20, 232448, 233472, 5120, 1980000, 2619000},
};

const struct gpu *get_gpu(void)
{
    const char *wanted = getenv("NULL_GPU_SM");
    return wanted && atoi(wanted) == 90 ? &GPUS[1] : &GPUS[0];
}

/* Of the driver and of the runtime, which number attributes alike. */
int get_attribute(int attribute)
{
    const struct gpu *gpu = get_gpu();
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return gpu->sm / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return gpu->sm % 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return gpu->multiprocessors;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return gpu->l2_cache;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return gpu->clock_khz;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return gpu->memory_clock_khz;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return gpu->memory_bus_width;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return gpu->shared_memory_per_block;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
        return gpu->shared_memory_per_multiprocessor;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: return 1;
    default: return 0;
    }
}

/* ---- memory */

#define SPACE (64ul << 40) /* address space, handed out once: an address never comes back */
#define PAGE 4096ul
#define GRAIN (2ul << 20) /* what a GPU hands out is a multiple of it */

struct allocation {
    char *start;
    size_t bytes;
    struct allocation *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *space, *unused;
static size_t used;
static struct allocation *on_device, *pinned;

static void note(struct allocation **list, char *start, size_t bytes)
{
    struct allocation *new = malloc(sizeof *new);
    *new = (struct allocation){start, bytes, *list};
    *list = new;
}

/* Returns its bytes, 0 for one that is not on the list. */
static size_t forget(struct allocation **list, const char *start)
{
    for (struct allocation **at = list; *at; at = &(*at)->next) {
        if ((*at)->start == start) {
            struct allocation *old = *at;
            size_t bytes = old->bytes;
            *at = old->next;
            free(old);
            return bytes;
        }
    }
    return 0;
}

void *allocate(size_t bytes)
{
    void *start = NULL;
    bytes = (bytes + GRAIN - 1) / GRAIN * GRAIN;
    pthread_mutex_lock(&lock);
    if (!space) {
        void *reserved = mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved != MAP_FAILED)
            space = unused = reserved;
    }
    if (space && used + bytes <= get_gpu()->memory && unused + bytes <= space + SPACE) {
        start = unused;
        note(&on_device, start, bytes);
        unused += bytes;
        used += bytes;
    }
    pthread_mutex_unlock(&lock);
    return start;
}

void release(void *pointer)
{
    pthread_mutex_lock(&lock);
    used -= forget(&on_device, pointer);
    pthread_mutex_unlock(&lock);
}

void *allocate_pinned(size_t bytes)
{
    void *start = NULL;
    if (posix_memalign(&start, PAGE, bytes))
        return NULL;
    pthread_mutex_lock(&lock);
    note(&pinned, start, bytes);
    pthread_mutex_unlock(&lock);
    return start;
}

void release_pinned(void *pointer)
{
    pthread_mutex_lock(&lock);
    forget(&pinned, pointer);
    pthread_mutex_unlock(&lock);
    free(pointer);
}

bool is_pinned(const void *pointer)
{
    const char *p = pointer;
    bool found = false;
    pthread_mutex_lock(&lock);
    for (const struct allocation *a = pinned; a && !found; a = a->next)
        found = p >= a->start && p < a->start + a->bytes;
    pthread_mutex_unlock(&lock);
    return found;
}

size_t get_free_memory(void) { return get_gpu()->memory - used; }

bool is_on_device(const void *pointer)
{
    return space && (const char *)pointer >= space && (const char *)pointer < space + SPACE;
}

void copy(void *to, const void *from, size_t bytes)
{
    if (is_on_device(to))
        return;
    if (is_on_device(from))
        memset(to, 0, bytes);
    else
        memcpy(to, from, bytes);
}

/* ---- handles and refusals */

void *make_handle(void) { return calloc(1, 64); }

static const char *refused = "";

const char *get_refused(void) { return refused; }

int refuse(const char *function)
{
    if (strcmp(refused, function))
        fprintf(stderr, "the null GPU has no %s\n", function);
    refused = function;
    return CUDA_ERROR_NOT_SUPPORTED;
}
