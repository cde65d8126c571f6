//! Checkpoint directories of LLaVA-Med: loading, random initialisation, saving.
