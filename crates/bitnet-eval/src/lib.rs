//! Perplexity and measurements of packed ternary models.
