//! Decoding and exact resizing of images.
