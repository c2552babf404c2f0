"""From a network and a preprocessed image to probabilities and a label map."""

from itertools import chain, combinations

import torch

MIRRORS = tuple(chain.from_iterable(combinations((2, 3, 4), count) for count in range(4)))  # the 8 sets of axes


@torch.inference_mode()
def predict(model, image: torch.Tensor, amp_dtype: torch.dtype | None = None, flips: bool = False) -> torch.Tensor:
    """Class probabilities float32 [4, D, H, W] of one image [4, D, H, W] on the model's device, in one pass over the
    whole volume; with `flips`, the mean over all eight mirror images (eight times the work)."""
    image = image[None]  # [1, 4, D, H, W]
    total = 0
    mirrors = MIRRORS if flips else MIRRORS[:1]
    for axes in mirrors:
        with torch.autocast(image.device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(image.flip(axes))
        total = total + logits.float().softmax(1).flip(axes)
    return total[0] / len(mirrors)
