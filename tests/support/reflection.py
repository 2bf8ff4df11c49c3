"""A client made from nothing but a server's reflection, as grpcurl is: no generated code of ours."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class ReflectedService:
    """Calls the unary methods of one service with dictionaries in protobuf's JSON form."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert service in database.get_services()
        self._channel = channel
        self._service = DescriptorPool(database).FindServiceByName(service)

    def call(self, method: str, request: dict[str, Any], timeout_s: float = 10.0) -> dict[str, Any]:
        descriptor = self._service.methods_by_name[method]
        message = json_format.ParseDict(request, GetMessageClass(descriptor.input_type)())
        invoke = self._channel.unary_unary(
            f"/{self._service.full_name}/{method}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )
        return json_format.MessageToDict(
            invoke(message, timeout=timeout_s),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
