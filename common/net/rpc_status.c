/* Our errors and gRPC's statuses; the pairs that lose detail are listed in one place. */
#include "common/net/rpc_call.h"

enum rpc_status rpc_status_of_err(enum odsi_err err)
{
    switch (err) {
    case ODSI_OK:
        return RPC_OK;
    case ODSI_ERR_INVALID:
        return RPC_INVALID_ARGUMENT;
    case ODSI_ERR_NOT_FOUND:
        return RPC_NOT_FOUND;
    case ODSI_ERR_EXISTS:
        return RPC_ALREADY_EXISTS;
    case ODSI_ERR_NO_MEMORY:
    case ODSI_ERR_BUSY:
        return RPC_RESOURCE_EXHAUSTED;
    case ODSI_ERR_CORRUPT:
        return RPC_DATA_LOSS;
    case ODSI_ERR_UNSUPPORTED:
        return RPC_UNIMPLEMENTED;
    case ODSI_ERR_DENIED:
        return RPC_PERMISSION_DENIED;
    case ODSI_ERR_TIMEOUT:
        return RPC_DEADLINE_EXCEEDED;
    case ODSI_ERR_CANCELLED:
        return RPC_CANCELLED;
    case ODSI_ERR_UNAVAILABLE:
        return RPC_UNAVAILABLE;
    case ODSI_ERR_STATE:
        return RPC_FAILED_PRECONDITION;
    case ODSI_ERR_RANGE:
        return RPC_OUT_OF_RANGE;
    case ODSI_ERR_IO:
    case ODSI_ERR_NUMERIC:
    case ODSI_ERR_INTERNAL:
        return RPC_INTERNAL;
    }
    return RPC_UNKNOWN;
}

enum odsi_err rpc_err_of_status(enum rpc_status status)
{
    switch (status) {
    case RPC_OK:
        return ODSI_OK;
    case RPC_CANCELLED:
        return ODSI_ERR_CANCELLED;
    case RPC_INVALID_ARGUMENT:
        return ODSI_ERR_INVALID;
    case RPC_DEADLINE_EXCEEDED:
        return ODSI_ERR_TIMEOUT;
    case RPC_NOT_FOUND:
        return ODSI_ERR_NOT_FOUND;
    case RPC_ALREADY_EXISTS:
        return ODSI_ERR_EXISTS;
    case RPC_PERMISSION_DENIED:
    case RPC_UNAUTHENTICATED:
        return ODSI_ERR_DENIED;
    case RPC_RESOURCE_EXHAUSTED:
        return ODSI_ERR_BUSY;
    case RPC_FAILED_PRECONDITION:
    case RPC_ABORTED:
        return ODSI_ERR_STATE;
    case RPC_OUT_OF_RANGE:
        return ODSI_ERR_RANGE;
    case RPC_UNIMPLEMENTED:
        return ODSI_ERR_UNSUPPORTED;
    case RPC_UNAVAILABLE:
        return ODSI_ERR_UNAVAILABLE;
    case RPC_DATA_LOSS:
        return ODSI_ERR_CORRUPT;
    case RPC_UNKNOWN:
    case RPC_INTERNAL:
        return ODSI_ERR_INTERNAL;
    }
    return ODSI_ERR_INTERNAL; /* a number that gRPC does not have */
}
