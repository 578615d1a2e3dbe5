"""`ModuleTuner`: hyperparameters tuned in the training loop of an ``nn.Module``."""

from hypergrad_torch.module.tuner import ModuleTuner

__all__ = ["ModuleTuner"]
