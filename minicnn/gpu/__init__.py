"""Training on the GPU: recorded steps, their plan, products and memory. CuPy is imported on use."""
