"""The export stage: PyTorch reference models in, self-describing ONNX files out."""
