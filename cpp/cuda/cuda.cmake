# CUDA kernels, one file per op. FEWBIT_CUDA:
#   AUTO      for the GPU of this machine, if it and nvcc are found
#   ON        for sm_75, 80, 86, 89, 90 and PTX of 90 (or CMAKE_CUDA_ARCHITECTURES)
#   EMULATE   the same sources as plain C++, every CUDA thread on the CPU: for tests
#   OFF

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)

if(FEWBIT_CUDA STREQUAL "EMULATE")
  add_library(fewbit_cuda OBJECT ${cuda_sources} ${CMAKE_CURRENT_LIST_DIR}/emulate.cpp)
  # Kernels are found by name (fewbit::cuda::Launch).
  set_source_files_properties(
    ${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-O1;-fvisibility=default")
  target_link_libraries(fewbit_cuda PRIVATE fewbit_options)
  # Pragmas are nvcc's; a fiber's jump is not one out of a frame.
  target_compile_options(fewbit_cuda PRIVATE -Wno-unknown-pragmas -U_FORTIFY_SOURCE)
  set(with_cuda 1)
  return()
endif()

# Without a toolkit, nvcc of the extra `cuda`: beside torch, with its libraries in lib, not in lib64
# where it has the linker look.
if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
endif()
find_program(NVCC nvcc PATHS $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
if(NOT CMAKE_CUDA_COMPILER AND NOT NVCC)
  file(GLOB packaged ${TORCH_DIR}/../nvidia/*/bin/nvcc)
  if(packaged)
    list(GET packaged -1 CMAKE_CUDA_COMPILER)
  endif()
endif()
if(CMAKE_CUDA_COMPILER)
  get_filename_component(toolkit ${CMAKE_CUDA_COMPILER}/../.. REALPATH)
  if(NOT EXISTS ${toolkit}/lib64)
    set(ENV{LIBRARY_PATH} ${toolkit}/lib:$ENV{LIBRARY_PATH})
  endif()
endif()

if(FEWBIT_CUDA STREQUAL "AUTO")
  find_program(NVIDIA_SMI nvidia-smi)
  if(NVIDIA_SMI)
    execute_process(COMMAND ${NVIDIA_SMI} -L OUTPUT_VARIABLE gpus ERROR_QUIET)
  endif()
  include(CheckLanguage)
  if(NOT gpus MATCHES "GPU 0")
    return()
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "fewbit: a GPU but no nvcc: CUDA tensors run as plain torch compositions")
    return()
  endif()
  set(default_architectures native)
else()
  set(default_architectures 75-real 80-real 86-real 89-real 90)
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${default_architectures})
endif()
enable_language(CUDA)
find_library(CUDART cudart_static REQUIRED
             HINTS ${toolkit}/lib ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
add_library(fewbit_cuda OBJECT ${cuda_sources})
target_include_directories(fewbit_cuda PRIVATE include)
# Products and sums are rounded apart, as in the reference; kernels say fmaf where they mean it.
target_compile_options(fewbit_cuda PRIVATE --fmad=false -Xcompiler=-Wall,-Wextra)
if(FEWBIT_WERROR)
  target_compile_options(fewbit_cuda PRIVATE -Werror=all-warnings -Xptxas=-Werror,-warn-spills)
endif()
set_target_properties(fewbit_cuda PROPERTIES CUDA_STANDARD 20 CUDA_RUNTIME_LIBRARY Static
                                             POSITION_INDEPENDENT_CODE ON
                                             CUDA_VISIBILITY_PRESET hidden)
target_link_libraries(fewbit_cuda PRIVATE ${CUDART} rt pthread ${CMAKE_DL_LIBS})
set(with_cuda 1)
