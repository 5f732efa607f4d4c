"""What a benchmark measures on: model, images, device and how often; one frozen record."""

from typing import Any, Literal

from pydantic import Field

from xaibatch.options import Options


class BenchmarkOptions(Options):
    """Everything that a benchmark's numbers depend on besides the machine."""

    model: str = "vit_tiny_patch16_224"
    """timm model name."""
    checkpoint: str | None = None
    """Weights; None: untrained with seeded weights, which takes the same time."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for timm's `create_model`, e.g. `img_size: 384`."""
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    """Fields that replace the model's own preprocessing."""
    data: str | None = None
    """Folder or manifest; None: random pictures made at run time."""
    images: int = Field(default=8, ge=1)
    """Images that trace explainers and metrics are measured on, in one batch."""
    heavy_images: int = Field(default=2, ge=1)
    """Images where each one costs hundreds of forward passes (sampling explainers, protocol); at most `images`."""
    metric_images: int = Field(default=8, ge=1)
    """Images that metrics are measured on, so many that Quantus too has full batches; at most `images`."""
    only: tuple[str, ...] = ()
    """Explainers or metrics to measure; empty: all."""
    num_samples: int = Field(default=500, ge=4)
    """Copies per image of LIME, KernelSHAP and RISE (the study: 500)."""
    num_steps: int = Field(default=49, ge=2)
    """Steps of metrics that remove an image bit by bit; a square number, so that square regions make as many."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=0, ge=0)
    """Threads of PyTorch; 0: as it chooses."""
    runs: int = Field(default=3, ge=1)
    """Rounds; in each one everything that is compared runs once."""
    max_batch: int = Field(default=0, ge=0)
    """Largest batch tried for the bare forward pass; 0: 64 on a CPU, 512 on a GPU."""
    compiled: bool = True
    """Also measure the forward pass under torch.compile, where there is a compiler."""
    end_to_end_images: int = Field(default=4, ge=1)
    """Images of the end-to-end runs with and without Ray, and of one against two replicas; at most `images`."""
    driver_cells: int = Field(default=200, ge=2)
    """Tiny cells that the driver's own speed is measured with."""
    seed: int = 0

    @property
    def largest_batch(self) -> int:
        return self.max_batch or (64 if self.device == "cpu" else 512)
