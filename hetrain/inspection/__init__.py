"""What can be said of a model, a broker and workers without training: plan and doctor."""
