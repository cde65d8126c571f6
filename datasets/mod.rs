//! Data set readers, one a file.
