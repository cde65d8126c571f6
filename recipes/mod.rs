//! Recipe plug-ins.
