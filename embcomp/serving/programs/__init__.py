"""Programs of artefacts in the forms that other runtimes take: ONNX, AOTInductor, and without tables."""
