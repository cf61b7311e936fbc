"""The pages, one a module; each has a function `render`."""
