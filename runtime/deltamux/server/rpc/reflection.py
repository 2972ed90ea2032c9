"""Reflection of the server's services, in version v1 and in v1alpha, which older clients use."""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

from deltamux.server.transport.services import Services

V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(names: Sequence[str], services: Services) -> None:
    """Adds both versions; they list the given services and themselves."""
    _describe_v1()
    versions = (V1, reflection.SERVICE_NAME)
    servicer: Any = reflection.aio.ReflectionServicer((*names, *versions))
    # The messages of both versions are the same on the wire.
    info = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    services.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(version, {"ServerReflectionInfo": info}) for version in versions]
    )


def _describe_v1() -> None:
    """Adds the descriptor of v1 to the pool; it differs from v1alpha's in its package only."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(V1)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        text = text_format.MessageToString(alpha).replace("reflection.v1alpha", "reflection.v1")
        pool.AddSerializedFile(
            text_format.Parse(
                text.replace("reflection/v1alpha", "reflection/v1"), descriptor_pb2.FileDescriptorProto()
            ).SerializeToString()
        )
