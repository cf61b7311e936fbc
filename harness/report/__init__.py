"""What a store says as one document that can be mailed, kept or pasted."""
