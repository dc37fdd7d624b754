"""Hand the model over: an ONNX file that was checked against torch, and timed on ONNX Runtime."""
