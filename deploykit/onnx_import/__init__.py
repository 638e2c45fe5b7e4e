"""Reading ONNX files nobody vouches for: checked, rebuilt as a torch module, and compared."""
