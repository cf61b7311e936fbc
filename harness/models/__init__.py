"""How to get a network: specs, the facts about a model, and loading."""
