"""onnxruntime: sessions, the proof of what ran where, the process apart."""
