"""What every short training in tests is set to: two cores, float32, a log at every step, and no file written."""

from __future__ import annotations

from typing import Any


def trainer_settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of any transformers or TRL trainer on the CPU.

    Args:
        folder: for what it writes all the same.
        changes: further ones; they win.
    """
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
        gradient_checkpointing=False,
    )
    return settings | changes
