"""How a network is served: what each model of the gallery takes and gives."""

__all__: list[str] = []
