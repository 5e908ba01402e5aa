"""What objectives that learn from a frozen base share."""

from transformers import PreTrainedModel


def freeze_teacher(teacher: PreTrainedModel | None, distillation_weight: float, hidden_weight: float = 0.0) -> None:
    """Check the weights of a teacher's part in the loss, and freeze it.

    Raises:
        ValueError: for a weight outside its range, or one that needs a teacher and has none.
    """
    if not 0 <= distillation_weight <= 1:
        raise ValueError(f"distillation_weight={distillation_weight} must lie in [0, 1].")
    if not hidden_weight >= 0:
        raise ValueError(f"hidden_weight={hidden_weight} must not be negative.")
    if teacher is not None:
        teacher.requires_grad_(False).eval()
    elif distillation_weight or hidden_weight:
        given = {"distillation_weight": distillation_weight, "hidden_weight": hidden_weight}
        named = " and ".join(f"{name}={value}" for name, value in given.items() if value)
        raise ValueError(f"{named} without a teacher: give the frozen base model.")
