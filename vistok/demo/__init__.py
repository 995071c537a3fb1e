"""The page on which a checkpoint is tried: `page` lays out what the other files do, which know
models and nothing of Gradio."""
