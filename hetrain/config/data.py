"""Which columns of the rows are learned, and which rows are held out."""

from __future__ import annotations

from dataclasses import dataclass

from hetrain.config.fields import as_tuple, require, setting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What of a data set is read and learned: names and meanings of TRL's `SFTConfig` where it has them.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    text_field: str = setting(
        "text", "Column of texts to continue; another name than the default counts before all other forms."
    )
    prompt_field: str = setting("prompt", "Column of prompts, which are not learned; as `text_field`.")
    completion_field: str = setting("completion", "Column of the completions to learn; as `text_field`.")
    strict: bool = setting(False, "Refuse rows with columns that are not used, instead of a warning.")
    completion_only_loss: bool | None = setting(
        None,
        "Learn completions alone, as by default in rows with a prompt; without, prompts too.",
        default="in rows with a prompt",
    )
    assistant_only_loss: bool = setting(
        False,
        "Learn what the assistant says alone, of messages. The chat template must mark it, or be one that "
        "hetrain or an installed trl knows how to mark.",
    )
    dataset_config: str | None = setting(
        None, "Configuration of a data set on the hub.", default="its default", metavar="NAME"
    )
    dataset_train_split: str = setting("train", "Split that is trained on, of a data set on the hub.")
    dataset_test_split: str = setting("test", "Split that is evaluated on, of a data set on the hub.")

    def __post_init__(self) -> None:
        for name in ("text_field", "prompt_field", "completion_field"):
            require(bool(getattr(self, name)), name, "a column needs a name")
        require(
            not (self.has_own_text and self.has_own_pair),
            "text_field",
            "a row is either a text, or a prompt and a completion",
            "leave out `text_field`, or `prompt_field` and `completion_field`",
        )

    @property
    def has_own_text(self) -> bool:
        """Whether a column of texts was named."""
        return self.text_field != "text"

    @property
    def has_own_pair(self) -> bool:
        """Whether a column of prompts or of completions was named."""
        return (self.prompt_field, self.completion_field) != ("prompt", "completion")


@dataclass(frozen=True, kw_only=True)
class TrainingDataConfig(DataConfig):
    """As `DataConfig`, and the rows on which the finished adapter is evaluated.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    eval_dataset: tuple[str, ...] = setting(
        (),
        "Rows that are not learned, in the forms of the data set: the finished adapter is evaluated on them, "
        "and during training as `eval_strategy` says.",
        default="none",
        metavar="DATASET",
    )
    validation_split: float = setting(
        0.0,
        "Part of the rows, drawn by `seed`, that is not learned and is evaluated as `eval_dataset` is, as in "
        "0.1.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_dataset", as_tuple(self.eval_dataset))
        super().__post_init__()
        inside = 0 <= self.validation_split < 1
        require(inside, "validation_split", f"{self.validation_split} does not lie in [0, 1)")
        require(
            not (self.validation_split and self.eval_dataset),
            "validation_split",
            "`eval_dataset` holds the rows to evaluate on",
            "give one of the two",
        )

    @property
    def holds_out(self) -> bool:
        """Whether rows are held out."""
        return bool(self.validation_split or self.eval_dataset)
