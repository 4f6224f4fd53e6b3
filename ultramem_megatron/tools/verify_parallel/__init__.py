"""Do two parallel layouts train the same model? `python -m ultramem_megatron.tools.verify_parallel`."""
