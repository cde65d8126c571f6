//! LLaVA-Med v1.5.
