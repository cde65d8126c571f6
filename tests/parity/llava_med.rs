//! LLaVA-Med v1.5 against microsoft/LLaVA-Med.
