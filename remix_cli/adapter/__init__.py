"""The library core: a routed pool of LoRAs on a frozen model. Needs torch and safetensors only.

    config.py    AdapterConfig: what is adapted and how it is routed
    clusters.py  which prompts belong together
    routing.py   pure functions: draw k of n, log-probabilities, inclusion probabilities, entropy, ESS
    layer.py     RoutedLinear (the masked-stack product) and Router
    patch.py     find targets, apply and remove the adapter
    trace.py     the one way in and out during a forward pass: set the mode, collect what was chosen
    store.py     the adapter folder: remix_config.json and adapter.safetensors

With your own training loop:

    from remix_cli.adapter.config import AdapterConfig
    from remix_cli.adapter.patch import apply_adapter

    adapter = apply_adapter(model, AdapterConfig(pool_size=8, active=4, rank=8), seed=0)
    with adapter.tracing(adapter.sampling(seed=0, rows=rows, length=length)) as trace:
        logits = model(**batch).logits      # trace.decisions now holds every router's choice
"""
