"""Answer extraction and verdicts: pure functions of texts. See docs/scoring.md."""
