"""The small checkpoints that come with the project, and the recipe that made them.

`checkpoints/NAME` holds each in Hugging Face format; models are asked for as `zoo:NAME`.
`python -m harness.zoo.recipe --help` trains another. Nothing here imports torch.
"""
