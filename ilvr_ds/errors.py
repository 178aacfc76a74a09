"""Errors a user can act on. Each message names the culprit (file, id, field) and what to do.

Every class here derives from `IlvrError`, so that a command-line tool can print the message and
exit with code 1 without a traceback, while a bug (any other exception) keeps its traceback.
"""


class IlvrError(Exception):
    """Base of every error that comes from what the user handed in, not from a bug."""


class ConfigError(IlvrError):
    """A recipe or an override names an unknown key, has a wrong type or an impossible combination."""


class RecordError(IlvrError):
    """A record cannot become a sample. Carries what `rejects.jsonl` needs."""

    def __init__(
        self, reason: str, message: str, *, origin: str, record_id: str | None = None, field: str | None = None
    ):
        self.reason = reason  # a short machine-readable word: "missing_image", "broken_json", ...
        self.message = message
        self.origin = origin  # "FILE:LINE"
        self.record_id = record_id
        self.field = field
        where = origin if record_id is None else f"{origin} (id {record_id!r})"
        super().__init__(f"{where}: {'' if field is None else f'field {field!r}: '}{message}")


class ShardError(IlvrError):
    """A shard, its index or its manifest is damaged, or they do not belong together."""


class ReadError(IlvrError):
    """Shards or the cache of remote ones cannot be reached: a disk, a permission, a server. Says nothing of their
    content, so it never counts as a bad sample."""


class PlanError(IlvrError):
    """The epoch cannot be planned: a sample over the token budget, an empty index, ..."""


class BatchError(IlvrError):
    """A sample does not fit its own plan (token counts, grids, spans), named by its id."""


class AttentionError(IlvrError):
    """An attention implementation was asked for by name and is missing, or was called without `cu_seqlens`."""


class CheckpointError(IlvrError):
    """A checkpoint is incomplete, belongs to another model or recipe, or cannot be resharded."""


class TrainingError(IlvrError):
    """Training cannot go on: too many skipped steps, a loss that is not finite, ..."""


class PuzzleError(IlvrError):
    """A FrozenLake map, a plan or a generator setting is impossible, or the sprites to draw it are missing."""


class EvaluationError(IlvrError):
    """An evaluation cannot go on: other settings than the ones it was begun with, a rank that stopped, ..."""
