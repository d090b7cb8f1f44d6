"""hetrain: private LoRA fine-tuning of open language models on other people's machines.

The client keeps data, adapters and keys; workers multiply ciphertexts by public weights.
"""

__version__ = "0.1.0"
