"""Backbone, varlen attention, placement, selection, teacher and student. Knows nothing of DeepSpeed."""
