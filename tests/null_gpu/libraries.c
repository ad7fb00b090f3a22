/* Of cuBLAS, cuBLASLt, cuDNN, NVRTC and CUPTI what torch calls. The real ones bring runtimes of their own,
 * which would ask this driver for more than it has.
 *
 * Functions that only compute or only set something are listed by name, without their arguments: on this
 * machine's calling convention a function may ignore what it is given. */
#include "null_gpu.h"

#include <stdint.h>
#include <string.h>

#define SETS(name) int name(void) { return 0; }
#define COMPUTES(name) int name(void) { null_gpu_counts.kernels++; return 0; }
#define MAKES(name) int name(void **handle) { *handle = make_handle(); return 0; }
#define SAYS(name, value) int name(void *object, int *answer) { *answer = value; return 0; }

/* ---- cuBLAS */

MAKES(cublasCreate_v2)
SETS(cublasDestroy_v2)
SETS(cublasSetStream_v2)
SETS(cublasSetWorkspace_v2)
SETS(cublasSetMathMode)
SETS(cublasSetPointerMode_v2)
SETS(cublasSetSmCountTarget)
SETS(cublasSetEmulationStrategy)
SAYS(cublasGetMathMode, 0)
SAYS(cublasGetPointerMode_v2, 0)
SAYS(cublasGetVersion_v2, 130100)
COMPUTES(cublasGemmEx)
COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasGemmBatchedEx)
COMPUTES(cublasSgemmEx)
COMPUTES(cublasSgemm_v2)
COMPUTES(cublasDgemm_v2)
COMPUTES(cublasSgemv_v2)
COMPUTES(cublasDgemv_v2)
COMPUTES(cublasSgemmStridedBatched)
COMPUTES(cublasDgemmStridedBatched)
COMPUTES(cublasSgemmBatched)
COMPUTES(cublasDgemmBatched)
COMPUTES(cublasDotEx)
COMPUTES(cublasSdot_v2)
COMPUTES(cublasDdot_v2)

/* ---- cuBLASLt */

MAKES(cublasLtCreate)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatrixLayoutCreate)
MAKES(cublasLtMatmulPreferenceCreate)
SETS(cublasLtDestroy)
SETS(cublasLtMatmulDescDestroy)
SETS(cublasLtMatmulDescSetAttribute)
SETS(cublasLtMatmulPreferenceDestroy)
SETS(cublasLtMatmulPreferenceSetAttribute)
SETS(cublasLtMatrixLayoutDestroy)
SETS(cublasLtMatrixLayoutSetAttribute)
COMPUTES(cublasLtMatmul)

size_t cublasLtGetVersion(void) { return 130100; }

struct heuristic { /* cublasLtMatmulHeuristicResult_t */
    unsigned long long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
    void *preference, int wanted, struct heuristic *results, int *found)
{
    memset(results, 0, sizeof *results);
    *found = 1;
    return 0;
}

/* ---- cuDNN's graphs, by which torch convolves: one engine for everything, which needs no workspace */

MAKES(cudnnCreate)
SETS(cudnnDestroy)
SETS(cudnnSetStream)
SETS(cudnnBackendDestroyDescriptor)
SETS(cudnnBackendFinalize)
SETS(cudnnBackendSetAttribute)
COMPUTES(cudnnBackendExecute)

int cudnnGetStream(void *handle, void **stream)
{
    *stream = NULL;
    return 0;
}

int cudnnBackendCreateDescriptor(int type, void **descriptor)
{
    *descriptor = make_handle();
    return 0;
}

/* Descriptors are made by who asks, for cuDNN to fill; every size is 0; there is nothing else to tell. */
int cudnnBackendGetAttribute(
    void *descriptor, int name, int type, int64_t wanted, int64_t *count, void *value)
{
    enum { INT64 = 3, DESCRIPTOR = 15, INT32 = 23 }; /* of cudnnBackendAttributeType_t */
    if (count)
        *count = type == INT64 || type == INT32 || type == DESCRIPTOR;
    if (value && type == INT64)
        *(int64_t *)value = 0;
    if (value && type == INT32)
        *(int32_t *)value = 0;
    return 0;
}

/* ---- NVRTC, which torch has compile some elementwise kernels (erfinv) at their first use */

static const char NO_PROGRAM[] = "compiled by nobody";

MAKES(nvrtcCreateProgram)
SETS(nvrtcDestroyProgram)
SETS(nvrtcCompileProgram)
SETS(nvrtcAddNameExpression)

static int get_size(void *program, size_t *bytes)
{
    *bytes = sizeof NO_PROGRAM;
    return 0;
}

static int get_text(void *program, char *text)
{
    memcpy(text, NO_PROGRAM, sizeof NO_PROGRAM);
    return 0;
}

int nvrtcGetPTXSize(void *program, size_t *bytes) { return get_size(program, bytes); }
int nvrtcGetCUBINSize(void *program, size_t *bytes) { return get_size(program, bytes); }
int nvrtcGetProgramLogSize(void *program, size_t *bytes) { return get_size(program, bytes); }
int nvrtcGetPTX(void *program, char *text) { return get_text(program, text); }
int nvrtcGetCUBIN(void *program, char *text) { return get_text(program, text); }
int nvrtcGetProgramLog(void *program, char *text) { return get_text(program, text); }
const char *nvrtcGetErrorString(int error) { return "an error of the null GPU's compiler"; }

int nvrtcVersion(int *major, int *minor)
{
    *major = 13, *minor = 0;
    return 0;
}

int nvrtcGetLoweredName(void *program, const char *name, const char **lowered)
{
    *lowered = name;
    return 0;
}

/* ---- CUPTI, by which torch.profiler watches a GPU: it sees nothing happen */

MAKES(cuptiSubscribe)
SETS(cuptiUnsubscribe)
SETS(cuptiEnableCallback)
SETS(cuptiEnableDomain)
SETS(cuptiFinalize)
SETS(cuptiActivityEnable)
SETS(cuptiActivityDisable)
SETS(cuptiActivityEnableCudaEventDeviceTimestamps)
SETS(cuptiActivityEnableDriverApi)
SETS(cuptiActivityEnableRuntimeApi)
SETS(cuptiActivityFlushAll)
SETS(cuptiActivityPushExternalCorrelationId)
SETS(cuptiActivityRegisterCallbacks)
SETS(cuptiActivityRegisterTimestampCallback)
SETS(cuptiActivitySetAttribute)

int cuptiActivityGetNextRecord(void) { return 12; } /* CUPTI_ERROR_MAX_LIMIT_REACHED: there is none */

int cuptiActivityPopExternalCorrelationId(int kind, unsigned long *last)
{
    if (last)
        *last = 0;
    return 0;
}

int cuptiActivityGetNumDroppedRecords(void *context, unsigned int stream, size_t *dropped)
{
    *dropped = 0;
    return 0;
}

int cuptiGetVersion(unsigned int *version)
{
    *version = 130000;
    return 0;
}

int cuptiGetResultString(int result, const char **text)
{
    *text = "a result of the null GPU's CUPTI";
    return 0;
}

int cuptiGetCallbackName(int domain, unsigned int id, const char **name)
{
    *name = "callback";
    return 0;
}
