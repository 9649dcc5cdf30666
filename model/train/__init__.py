"""Training: recipe -> tokenizer -> target -> lists -> drafts -> evaluation -> bundle. Serving never imports this."""
