"""OpenAPI 3.1 of one release: its columns are in the document."""

from __future__ import annotations

from typing import Any

from serving.contract import RELEASE_HEADER, Column, InputSchema, Manifest
from serving.rows import INT64, expected_of

JSON = "application/json"


def document(manifest: Manifest, schema: InputSchema) -> dict[str, Any]:
    """The description of a service that serves this release."""
    row = {
        "type": "object",
        "additionalProperties": False,
        "required": [column.name for column in schema.features],
        "properties": {column.name: _column(column) for column in (*schema.keys, *schema.features)},
    }
    rows = {
        "type": "array",
        "minItems": 1,
        "maxItems": manifest.limits.max_rows,
        "items": {"$ref": "#/components/schemas/Row"},
    }
    body = {
        "oneOf": [
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["rows"],
                "properties": {"rows": rows},
            },
            rows,
            {"$ref": "#/components/schemas/Row"},
        ]
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": manifest.project, "version": manifest.release_id},
        "paths": {
            "/predict": {
                "post": {
                    "operationId": "predict",
                    "summary": "Predict rows",
                    "parameters": [
                        {
                            "name": "x-request-id",
                            "in": "header",
                            "description": "Kept where it is 1 to 64 of A-Z a-z 0-9 . _ : -, else replaced",
                            "schema": {"type": "string"},
                        }
                    ],
                    "requestBody": {"required": True, "content": {JSON: {"schema": body}}},
                    "responses": {
                        "200": _response("Predictions", "Predictions"),
                        **{
                            status: _response(text, "Error")
                            for status, text in (
                                ("400", "The body is not JSON"),
                                ("408", "The body took too long"),
                                ("413", "The body is too large"),
                                ("415", "The body is not application/json"),
                                ("422", "A row does not fit the schema"),
                                ("429", "Too many requests at once"),
                                ("500", "The model failed"),
                                ("503", "The model is not loaded yet"),
                            )
                        },
                    },
                }
            },
            "/metadata": {"get": _get("metadata", "The release and its schema")},
            "/health/live": {"get": _get("live", "The process runs")},
            "/health/ready": {"get": _get("ready", "The model is loaded and the service takes requests")},
        },
        "components": {
            "schemas": {
                "Row": row,
                "Predictions": {
                    "type": "object",
                    "required": ["release_id", "request_id", "predictions"],
                    "properties": {
                        "release_id": {"type": "string"},
                        "request_id": {"type": "string"},
                        "predictions": {"type": "array", "items": {"type": "number"}},
                    },
                },
                "Error": {
                    "type": "object",
                    "required": ["error", "request_id", "release_id"],
                    "properties": {
                        "error": {"type": "string", "description": "what is wrong, in one sentence"},
                        "row": {"type": "integer"},
                        "column": {"type": "string"},
                        "found": {"type": "string"},
                        "expected": {"type": "string"},
                        "nearest": {"type": "string"},
                        "release_id": {"type": "string"},
                        "request_id": {"type": "string"},
                    },
                },
            }
        },
    }


def _column(column: Column) -> dict[str, Any]:
    json_type = "string" if column.type == "timestamp" else column.type
    schema: dict[str, Any] = {
        "type": [json_type, "null"] if column.nullable else json_type,
        "description": expected_of(column),
    }
    if column.type == "integer":
        schema |= {"minimum": INT64.start, "maximum": INT64.stop - 1}
    if column.type == "timestamp" and column.utc:
        schema["format"] = "date-time"
    return schema


def _response(description: str, name: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {RELEASE_HEADER: {"schema": {"type": "string"}}},
        "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{name}"}}},
    }


def _get(operation: str, summary: str) -> dict[str, Any]:
    return {"operationId": operation, "summary": summary, "responses": {"200": {"description": summary}}}
