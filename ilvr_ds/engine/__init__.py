"""DeepSpeed: configuration, build, step, EMA, checkpoint. The only place that imports deepspeed."""
