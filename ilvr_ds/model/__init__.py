"""Backbone adapter, varlen attention, placement, selection, teacher and student. Knows nothing of files or DeepSpeed."""
