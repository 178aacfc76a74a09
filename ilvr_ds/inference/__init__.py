"""Using a trained model: latent decoding, tasks, scoring. Knows nothing of DeepSpeed."""
