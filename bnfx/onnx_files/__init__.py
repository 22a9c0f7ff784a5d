"""ONNX files: read, retyped, placed atomically."""
