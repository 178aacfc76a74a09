"""For tests and benchmarks: a toy objective, and a launcher of gloo ranks on one machine."""
