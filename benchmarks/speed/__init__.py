"""Speed and memory: the network alone, a bare loop, torchsde and this package, in the same run and interleaved."""
